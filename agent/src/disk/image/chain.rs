//! Which files an image consists of, and whether QEMU may be given them.
//!
//! Owns the walk from an image down its backing files. At each step, names are first read from the header by
//! ourselves, resolved, held against the agent's allowed directories and opened and locked; only then is QEMU
//! asked about that one file. Then the whole chain is written down as QEMU's block options, so that QEMU
//! never follows a name from a header. Leaves alone what the content is.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ImageError;
use super::format::Format;
use super::header::{self, HeaderError};
use super::held::HeldFile;
use super::raw::RawImage;
use super::{Flatten, OpenOptions, program};

/// Longest chain of backing files.
const LAYERS_MAX: usize = 64;
/// How long QEMU may think about one file's header.
const INFO_LIMIT: Duration = Duration::from_secs(30);
/// Most that QEMU may say of one file: some thousand snapshots.
const INFO_MAX: u64 = 4 << 20;

/// An image and all files it depends on, opened and locked.
#[derive(Debug)]
pub(super) struct Chain {
    /// QEMU's block options for the whole of it.
    pub(super) options: Value,
    pub(super) format: Format,
    pub(super) held: Vec<HeldFile>,
    pub(super) notes: Vec<String>,
}

/// One image of the chain, before it is tied to the one below.
struct Layer {
    path: PathBuf,
    options: Value,
    backing: Option<(PathBuf, Format)>,
}

/// The part of `qemu-img info --output=json` that is of interest.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    dirty_flag: bool,
    #[serde(default)]
    snapshots: Vec<Snapshot>,
    #[serde(default)]
    format_specific: Value,
}

#[derive(Deserialize)]
struct Snapshot {
    name: String,
}

impl Chain {
    /// Opens `path` and everything below it.
    pub(super) fn open(path: &Path, options: &OpenOptions<'_>) -> Result<Self, ImageError> {
        let mut walk = Walk {
            options,
            probed: options.format.is_none(),
            held: Vec::new(),
            notes: Vec::new(),
        };
        let top = walk.hold(&absolute(path)?, None)?;
        let format = match &options.format {
            Some(format) => format.clone(),
            None => Format::probe(&RawImage(&walk.held[top])).map_err(ImageError::io("read", path))?,
        };
        if walk.probed && format != Format::Raw {
            walk.notes.push(format!(
                "the format {format} was recognised by the content, not stated in the config"
            ));
        }
        let layers = walk.down(top, format.clone())?;
        if let [_, below, ..] = layers.as_slice() {
            if options.flatten == Flatten::Refuse {
                let what = format!("a backing file ({})", below.path.display());
                return Err(ImageError::NotFlat {
                    path: path.to_owned(),
                    what,
                });
            }
            walk.notes
                .push(format!("a chain of {} images was flattened", layers.len()));
        }
        let chain = layers
            .into_iter()
            .map(|layer| layer.options)
            .rev()
            .reduce(|below, mut layer| {
                layer["backing"] = below;
                layer
            });
        let unlocked = walk.held.iter().find(|file| !file.is_locked());
        if let Some(file) = unlocked {
            walk.notes.push(format!(
                "the file system of {} has no locks: only later changes are detected",
                file.path().display()
            ));
        }
        Ok(Self {
            options: chain.unwrap_or_default(),
            format,
            held: walk.held,
            notes: walk.notes,
        })
    }
}

struct Walk<'a> {
    options: &'a OpenOptions<'a>,
    /// Whether the top image's format is a guess.
    probed: bool,
    held: Vec<HeldFile>,
    notes: Vec<String>,
}

impl Walk<'_> {
    /// Opens and locks one file, if this agent may; gives its place in `held`.
    fn hold(&mut self, path: &Path, by: Option<&Path>) -> Result<usize, ImageError> {
        let real = std::fs::canonicalize(path).map_err(ImageError::io("find", path))?;
        let is_allowed = |path: &Path| (self.options.allowed)(path);
        if !is_allowed(&real) && !device_link(path).is_some_and(|link| is_allowed(&link)) {
            return Err(ImageError::NotAllowed {
                path: real,
                by: by.map(Path::to_owned),
            });
        }
        let file = HeldFile::open(path, &real)?;
        let identity = file.identity().map_err(ImageError::io("examine", path))?;
        for other in &self.held {
            if other.identity().map_err(ImageError::io("examine", path))? == identity {
                let what = format!("contains {} twice", path.display());
                return Err(ImageError::Chain {
                    path: self.held[0].path().to_owned(),
                    what,
                });
            }
        }
        self.held.push(file);
        Ok(self.held.len() - 1)
    }

    /// Walks from the image at `held[top]` to the last backing file; gives them, topmost first.
    fn down(&mut self, top: usize, format: Format) -> Result<Vec<Layer>, ImageError> {
        let mut layers = Vec::new();
        let mut at = top;
        let mut format = format;
        while layers.len() < LAYERS_MAX {
            let mut layer = self.layer(at, &format)?;
            let backing = layer.backing.take();
            layers.push(layer);
            let Some((path, backing_format)) = backing else {
                return Ok(layers);
            };
            let by = self.held[at].path().to_owned();
            at = self.hold(&path, Some(&by))?;
            format = backing_format;
        }
        let path = self.held[top].path().to_owned();
        Err(ImageError::Chain {
            path,
            what: format!("has more than {LAYERS_MAX} images"),
        })
    }

    fn layer(&mut self, at: usize, format: &Format) -> Result<Layer, ImageError> {
        let file = &self.held[at];
        let (path, real) = (file.path().to_owned(), file.name_for_qemu().to_owned());
        if *format == Format::Raw {
            let options = json!({ "driver": "raw", "read-only": true, "file": protocol(file) });
            let backing = None;
            return Ok(Layer {
                path,
                options,
                backing,
            });
        }
        let header =
            header::read(format, &RawImage(file)).map_err(|error| untrusted(&path, format, error))?;
        refuse_marked(&path, format, header.encrypted, header.dirty, header.corrupt)?;
        let backing = match &header.backing {
            Some(backing) => Some(self.backing(&path, format, backing)?),
            None => None,
        };
        let mut options = json!({ "driver": format.name(), "read-only": true, "file": protocol(file) });
        for part in &header.parts {
            // These names QEMU follows by itself, from the place where it opens the image.
            let place = self.resolve(&real, format, &part.name)?;
            let held = self.hold(&place, Some(&path))?;
            if !part.flat {
                let checked = header::check_part(&RawImage(&self.held[held]));
                checked.map_err(|error| untrusted(&place, format, error))?;
            }
        }
        if let Some(name) = &header.data_file {
            let place = self.resolve(&path, format, name)?;
            let held = self.hold(&place, Some(&path))?;
            options["data-file"] = protocol(&self.held[held]);
        }
        if header.backing.is_some() || takes_backing(format) {
            options["backing"] = Value::Null;
        }
        self.ask(&path, format, &options)?;
        Ok(Layer {
            path,
            options,
            backing,
        })
    }

    fn backing(
        &self,
        path: &Path,
        format: &Format,
        backing: &header::Backing,
    ) -> Result<(PathBuf, Format), ImageError> {
        let place = self.resolve(path, format, &backing.name)?;
        let Some(name) = &backing.format else {
            // To probe it would let whoever wrote it decide which further file is opened.
            return Err(ImageError::BackingFormat {
                path: path.to_owned(),
                backing: backing.name.clone(),
            });
        };
        let backing_format = name.parse().map_err(|error: super::format::UnknownFormat| {
            malformed(path, format, &format!("its backing file's format {error}"))
        })?;
        Ok((place, backing_format))
    }

    /// The file that a name in the header of `path` means: relative to the image's directory, as for QEMU.
    fn resolve(&self, path: &Path, format: &Format, name: &str) -> Result<PathBuf, ImageError> {
        if self.probed {
            return Err(ImageError::ProbedReference {
                path: path.to_owned(),
                format: format.clone(),
                refers_to: name.to_owned(),
            });
        }
        // A colon before the first slash names a protocol: "nbd:...", "json:{...}".
        let first = name.split('/').next().unwrap_or_default();
        if name.is_empty() || first.contains(':') {
            return Err(ImageError::NotLocal {
                path: path.to_owned(),
                refers_to: name.to_owned(),
            });
        }
        Ok(path.parent().unwrap_or_else(|| Path::new("/")).join(name))
    }

    /// Asks QEMU about one file, alone: damage, encryption, and snapshots inside of it.
    fn ask(&mut self, path: &Path, format: &Format, options: &Value) -> Result<(), ImageError> {
        let mut command = program::command(&self.options.qemu_img);
        command
            .args(["info", "--output=json", "--force-share"])
            .arg(format!("json:{options}"));
        let answer = program::output(&mut command, INFO_LIMIT, INFO_MAX)?;
        let info: Info = serde_json::from_slice(&answer).map_err(|error| {
            malformed(
                path,
                format,
                &format!("qemu-img speaks of it in an unknown way: {error}"),
            )
        })?;
        let corrupt = info.format_specific["data"]["corrupt"].as_bool().unwrap_or(false);
        refuse_marked(path, format, info.encrypted, info.dirty_flag, corrupt)?;
        if info.snapshots.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = info
            .snapshots
            .iter()
            .take(10)
            .map(|snapshot| {
                snapshot
                    .name
                    .chars()
                    .filter(|c| !c.is_control())
                    .collect::<String>()
            })
            .collect();
        let count = info.snapshots.len();
        let more = if count > names.len() { ", …" } else { "" };
        let what = format!("{count} internal snapshots ({}{more})", names.join(", "));
        if self.options.flatten == Flatten::Refuse {
            return Err(ImageError::NotFlat {
                path: path.to_owned(),
                what,
            });
        }
        self.notes.push(format!(
            "{} has {what}; the current state is copied, the snapshots are not",
            path.display()
        ));
        Ok(())
    }
}

/// QEMU's options for the file under an image.
fn protocol(file: &HeldFile) -> Value {
    let driver = if file.is_device() { "host_device" } else { "file" };
    // Where a name is not UTF-8, QEMU's options cannot express it: it then says that there is no such file.
    json!({ "driver": driver, "filename": file.name_for_qemu().to_string_lossy(), "read-only": true })
}

/// Whether QEMU's driver would look for a backing file if it were not told that there is none.
fn takes_backing(format: &Format) -> bool {
    match format {
        Format::Qcow2 | Format::Qed | Format::Vmdk => true,
        Format::Other(name) => name == "qcow",
        Format::Raw | Format::Vhdx | Format::Vpc | Format::Vdi => false,
    }
}

fn refuse_marked(
    path: &Path,
    format: &Format,
    encrypted: bool,
    dirty: bool,
    corrupt: bool,
) -> Result<(), ImageError> {
    let path = path.to_owned();
    if encrypted {
        return Err(ImageError::Encrypted {
            path,
            format: format.clone(),
        });
    }
    match (corrupt, dirty) {
        (true, _) => Err(ImageError::Damaged {
            path,
            what: "corrupt",
        }),
        (_, true) => Err(ImageError::Damaged {
            path,
            what: "dirty (not closed cleanly)",
        }),
        _ => Ok(()),
    }
}

fn untrusted(path: &Path, format: &Format, error: HeaderError) -> ImageError {
    match error {
        HeaderError::Io(source) => ImageError::io("read", path)(source),
        HeaderError::Malformed(what) => malformed(path, format, what),
    }
}

fn malformed(path: &Path, format: &Format, what: &str) -> ImageError {
    ImageError::Malformed {
        path: path.to_owned(),
        format: format.clone(),
        what: what.to_owned(),
    }
}

/// The name in /dev by which a block device is known, a link or not: the system makes these names, and what a
/// logical volume's name leads to (`dm-7`) is of no use in a config.
fn device_link(path: &Path) -> Option<PathBuf> {
    let folder = std::fs::canonicalize(path.parent()?).ok()?;
    let link = folder.join(path.file_name()?);
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    (is_device && folder.starts_with("/dev")).then_some(link)
}

/// Relative names in headers count from the path by which an image was named, not from where a link leads.
fn absolute(path: &Path) -> Result<PathBuf, ImageError> {
    std::path::absolute(path).map_err(ImageError::io("find", path))
}
