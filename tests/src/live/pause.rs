//! How long the guest stood still.
//!
//! Owns the two measures: from QEMU's STOP at the source to RESUME at the target, and the longest time
//! between two heartbeats heard on either console. Pure. Promises nothing where an event is missing.

use super::monitor::Event;

/// Seconds of the host's clock at which the guest last stopped at the source and then ran at the target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pause {
    pub stopped: f64,
    pub resumed: f64,
}

impl Pause {
    /// Its length in milliseconds.
    pub fn ms(self) -> f64 {
        (self.resumed - self.stopped) * 1e3
    }
}

/// The pause between two QEMUs: the first RESUME at the target, and the last STOP at the source before it.
pub fn pause(source: &[Event], target: &[Event], from: f64) -> Option<Pause> {
    let named = |events: &[Event], name: &str| -> Vec<f64> {
        let named = events
            .iter()
            .filter(|event| event.name == name && event.time >= from);
        named.map(|event| event.time).collect()
    };
    let resumed = named(target, "RESUME").into_iter().next()?;
    let stopped = named(source, "STOP").into_iter().rfind(|time| *time <= resumed)?;
    Some(Pause { stopped, resumed })
}

/// Times at which a source's QEMU stopped and went on itself, in milliseconds: a handover that was given up.
pub fn interruptions(source: &[Event], from: f64) -> Vec<f64> {
    let mut stopped = None;
    let mut times = Vec::new();
    for event in source.iter().filter(|event| event.time >= from) {
        match event.name.as_str() {
            "STOP" => stopped = Some(event.time),
            "RESUME" => times.extend(stopped.take().map(|stopped: f64| (event.time - stopped) * 1e3)),
            _ => {}
        }
    }
    times
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn event(name: &str, time: f64) -> Event {
        Event {
            name: name.to_owned(),
            data: Value::Null,
            time,
            life: 0,
        }
    }

    #[test]
    fn the_pause_is_from_the_last_stop_to_the_first_resume_after_it() {
        let source = [
            event("STOP", 5.0),
            event("RESUME", 5.2),
            event("STOP", 9.0),
            event("STOP", 20.0),
        ];
        let target = [
            event("MIGRATION", 9.1),
            event("RESUME", 9.3),
            event("RESUME", 15.0),
        ];
        let found = pause(&source, &target, 1.0).unwrap();
        assert_eq!((found.stopped, found.resumed), (9.0, 9.3));
        assert!((found.ms() - 300.0).abs() < 1e-6);
        assert_eq!(pause(&source, &[], 0.0), None);
        assert_eq!(pause(&source[..2], &target, 6.0), None);
        let interruptions = interruptions(&source, 0.0);
        assert!(interruptions.len() == 1 && (interruptions[0] - 200.0).abs() < 1e-6);
    }
}
