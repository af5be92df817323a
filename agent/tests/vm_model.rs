//! Explores the handover exhaustively: the machines that run, over every order of loss, delay, crash and failure within a bound.
//!
//! `LONGHAUL_MODEL_MISHAPS` (default 1) and `LONGHAUL_MODEL_GENERATIONS` (default 1) set the bound: each mishap is a crash of an
//! agent, a failure of a QEMU, of a disk or of a journal, a corrupt stream, or the loss of a whole site. Lost, doubled, late and
//! reordered words cost nothing: every word ever sent may arrive at any time, any number of times, or never. That is what two
//! gateways and a link can do at worst, crashes of theirs included.

#[path = "vm_model/explore.rs"]
mod explore;
#[path = "vm_model/world.rs"]
mod world;

use explore::{Explored, explore};
use world::{Bounds, Fault, World};

fn bound(name: &str, default: u8) -> u8 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().expect("a bound is a small number"))
}

fn holds(start: World) -> Explored {
    match explore(start) {
        Ok(explored) => {
            println!("{explored:?}");
            assert!(explored.states > 1000, "{explored:?}: the model does not move");
            let both = explored.ran_at_target > 0 && explored.ran_at_source > 0;
            assert!(both, "{explored:?}: one outcome is never reached");
            explored
        }
        Err(violation) => panic!("{violation}"),
    }
}

#[test]
fn no_order_of_events_makes_two_owners_or_none_or_loses_a_write() {
    let mishaps = bound("LONGHAUL_MODEL_MISHAPS", 1);
    let generations = bound("LONGHAUL_MODEL_GENERATIONS", 1);
    holds(World::new(Bounds { mishaps, generations }, None));
}

#[test]
fn a_second_try_is_not_disturbed_by_the_words_of_the_first() {
    let mishaps = bound("LONGHAUL_MODEL_MISHAPS_SECOND", 0);
    holds(World::second_try(Bounds {
        mishaps,
        generations: 2,
    }));
}

/// The model is worth something only if it sees what is wrong.
#[test]
fn every_seeded_fault_is_found() {
    for fault in Fault::ALL {
        let bounds = Bounds {
            mishaps: fault.mishaps(),
            generations: 1,
        };
        match explore(World::new(bounds, Some(fault))) {
            Ok(explored) => panic!("{fault:?} was not found in {explored:?}"),
            Err(violation) => println!("{fault:?}: {}", violation.lines().next().unwrap_or_default()),
        }
    }
}
