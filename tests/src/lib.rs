//! The lab: two sites on one machine, joined by an emulated WAN, with real programs in them.
//!
//! Owns namespaces, the emulator, the programs' processes, faults on command, an own comparison of source and
//! target, guests that boot, and the report. Leaves alone how a move works: it knows the programs only by
//! their command lines, settings and printed events (all in `programs`). Promises that nothing it started
//! outlives it.

pub mod beside;
pub mod cold_rival;
pub mod compare;
pub mod demo;
pub mod faults;
pub mod guest;
pub mod hostile;
pub mod ideas;
pub mod janitor;
pub mod lab;
pub mod live;
pub mod move_disk;
pub mod namespace;
pub mod page;
pub mod process;
pub mod programs;
pub mod report;
pub mod usage;
pub mod wan;

/// The lab's own executable, which also is the emulator and the janitor. A test program finds it beside its
/// own directory, where cargo puts it.
///
/// # Errors
/// When the system cannot say which file this program was started from.
pub fn own_program() -> std::io::Result<std::path::PathBuf> {
    let program = std::env::current_exe()?;
    let directory = program.parent().filter(|directory| directory.ends_with("deps"));
    Ok(directory
        .and_then(|deps| deps.parent())
        .map_or_else(|| program.clone(), |built| built.join("lab")))
}

/// The repository that this program is run from or was built in, if it can be found.
pub fn repository() -> Option<std::path::PathBuf> {
    let here = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let starts = [here, program].into_iter().flatten();
    starts.into_iter().find_map(|start| {
        start
            .ancestors()
            .find(|directory| directory.join("Cargo.lock").exists())
            .map(std::path::Path::to_path_buf)
    })
}
