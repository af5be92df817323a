//! Writes the seeds of every entry: `seeds FOLDER` makes FOLDER/NAME/seed-N.

use std::io;
use std::path::PathBuf;

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| io::Error::other("usage: seeds FOLDER"))?;
    for entry in longhaul_lab::hostile::ENTRIES {
        let corpus = folder.join(entry.name);
        std::fs::create_dir_all(&corpus)?;
        for (number, seed) in (entry.seeds)()?.iter().enumerate() {
            std::fs::write(corpus.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
