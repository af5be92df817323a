//! What people get wrong when they use the lab.
//!
//! Owns mistakes of its command line that only show when it works. Leaves its faults and its guests to `faults` and `live`. Promises that
//! each is named at once, with the path that was given.

use std::process::Command;

#[test]
fn a_folder_that_is_not_there_is_named_before_anything_is_made() {
    let here = tempfile::tempdir().unwrap();
    let (image, absent) = (here.path().join("image"), here.path().join("absent"));
    std::fs::write(&image, [0; 4096]).unwrap();
    let absent_image = absent.join("new");
    let [image, absent, absent_image] = [&image, &absent, &absent_image].map(|path| path.to_str().unwrap());
    for words in [
        &["move", "--loopback", "--image", image, "--directory", absent][..],
        &["live", "--loopback", "--directory", absent],
        &["image", "--out", absent_image],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_lab"))
            .args(words)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{words:?}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains(absent), "{words:?}: {said}");
        assert!(last.contains("folder"), "{words:?}: {said}");
    }
}
