//! One disk that was moved away and comes back, as far as records and names go.

use std::fs::{self, File};

use super::*;
use crate::disk::apply::Seal;

const SIZE: u64 = 3 << 20;

/// A host that a VM was moved away from by the job `left`, with generation 2.
struct Host {
    dir: tempfile::TempDir,
    state: PathBuf,
    left: JobId,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Self {
            state: dir.path().join("state"),
            left: JobId::random(),
            dir,
        };
        fs::write(host.shadow(), vec![7; SIZE as usize]).unwrap();
        let seal = Seal::of(&File::open(host.shadow()).unwrap()).unwrap();
        host.save(Some(Left {
            seal,
            free: Vec::new(),
        }));
        host
    }

    fn save(&self, left: Option<Left>) {
        let disk = ShadowDisk {
            file: self.image(),
            format: "raw".to_owned(),
            size: SIZE,
            left,
            lent: None,
        };
        let shadows = Shadows {
            generation: 2,
            disks: vec![disk],
        };
        shadows.save(&self.state, self.left).unwrap();
    }

    fn image(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join("web.img")
    }

    fn shadow(&self) -> PathBuf {
        shadow_of(&self.image(), self.left)
    }

    fn record(&self) -> Option<ShadowDisk> {
        let shadows: Shadows = record::one(&self.state, KIND, self.left)?;
        shadows.disks.into_iter().next()
    }

    fn id(&self) -> ShadowId {
        ShadowId {
            job: self.left,
            generation: 2,
            disk: DiskIndex(0),
        }
    }

    fn options(&self, job: JobId) -> TargetOptions {
        TargetOptions {
            run_dir: self.dir.path().to_owned(),
            state_dir: self.state.clone(),
            ..TargetOptions::raw(self.image(), job)
        }
    }

    fn disk(&self, since: Option<ShadowId>) -> TargetDisk {
        TargetDisk {
            path: self.image(),
            format: "raw".to_owned(),
            size: SIZE,
            needed: SIZE,
            preallocate: false,
            overwrite: false,
            shadow: true,
            since,
        }
    }

    fn open(&self, job: JobId, disk: &TargetDisk) -> (Target, Have) {
        open_disk(job, DiskIndex(0), disk, &self.options(job), &self.state).unwrap()
    }
}

fn patch(target: &Target) {
    let (attempt, round) = (longhaul_common::ids::Attempt(1), longhaul_common::ids::Round(1));
    let pieces = [crate::disk::apply::Piece::Data {
        offset: 0,
        bytes: &[1; 4096],
    }];
    target.patch(attempt, round, &pieces).unwrap();
}

#[test]
fn a_job_that_was_given_up_returns_the_shadow_and_what_it_is_worth() {
    let host = Host::new();
    let (first, second, third) = (JobId::random(), JobId::random(), JobId::random());
    let disk = host.disk(Some(host.id()));
    let (target, have) = host.open(first, &disk);
    assert!(have.has_shadow() && !host.shadow().exists());
    assert!(target.notes()[0].contains("knows what was written since"));
    assert_eq!(lent_to(first, &host.state), [(host.id(), 0)]);
    give_up(first, vec![target], &mut [], &host.state).unwrap();
    assert!(host.shadow().exists() && host.record().unwrap().lent.is_none());

    let (target, have) = host.open(second, &disk);
    assert!(have.has_shadow(), "nothing was written over it");
    patch(&target);
    give_up(second, vec![target], &mut [], &host.state).unwrap();
    assert_eq!(host.record().unwrap().left, None);

    let (target, have) = host.open(third, &disk);
    assert!(
        !have.has_shadow() && have.bytes() == SIZE,
        "now digests say what it holds"
    );
    assert!(target.notes()[0].contains("digests are compared"));
    drop(target);
    used_up(third, &host.state);
    assert!(host.record().is_none());
}

#[test]
fn a_shadow_is_not_trusted_without_proof() {
    let taken = |host: &Host, since: Option<ShadowId>| {
        let (target, have) = host.open(JobId::random(), &host.disk(since));
        (target.began_with_shadow(), have.has_shadow())
    };
    let host = Host::new();
    let other = ShadowId {
        generation: 1,
        ..host.id()
    };
    assert_eq!(taken(&host, Some(other)), (true, false), "another stream");
    let host = Host::new();
    assert_eq!(taken(&host, None), (true, false), "nobody knows the changes");
    let host = Host::new();
    host.save(None);
    assert_eq!(
        taken(&host, Some(host.id())),
        (true, false),
        "nobody knows how it was left"
    );
    let host = Host::new();
    lend(
        &host.id(),
        Some(Lent {
            job: JobId::random().to_string(),
            disk: 0,
        }),
        &host.state,
    )
    .unwrap();
    assert_eq!(taken(&host, Some(host.id())), (true, false), "somebody had it");
    let host = Host::new();
    File::options()
        .write(true)
        .open(host.shadow())
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(
        &File::options().write(true).open(host.shadow()).unwrap(),
        b"x",
        9,
    )
    .unwrap();
    assert_eq!(
        taken(&host, Some(host.id())),
        (true, false),
        "somebody touched it"
    );
    let host = Host::new();
    let (target, have) = host.open(
        JobId::random(),
        &TargetDisk {
            shadow: false,
            ..host.disk(Some(host.id()))
        },
    );
    assert!(!target.began_with_shadow() && have.bytes() == 0 && host.shadow().exists());
    let host = Host::new();
    fs::rename(host.shadow(), host.dir.path().join("elsewhere")).unwrap();
    assert_eq!(taken(&host, Some(host.id())), (false, false), "it is gone");
}

#[test]
fn a_copy_goes_on_after_a_crash_and_is_known_to_have_been_a_shadow() {
    let host = Host::new();
    let job = JobId::random();
    let disk = host.disk(Some(host.id()));
    let (target, _) = host.open(job, &disk);
    patch(&target);
    target.flush().unwrap();
    drop(target);
    let (target, have) = host.open(job, &disk);
    assert!(!target.began_with_shadow() && have.bytes() == SIZE - (1 << 20));
    assert_eq!(lent_to(job, &host.state), [(host.id(), 0)]);
    give_up(job, vec![target], &mut [], &host.state).unwrap();
    assert!(host.shadow().exists());
    assert_eq!(host.record().unwrap().left, None, "what it holds is not known");
}
