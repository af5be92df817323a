//! From runs to figures. Pure.
//!
//! Owns medians and what one contestant did in one cell. Leaves alone how it is shown. Promises that only runs that ended
//! well give figures, and that how many there were is never lost.

use super::contestant::Contestant;
use super::plan::{Cell, is_of};
use super::record::{End, Record};

/// The middle one, or the mean of the two in the middle.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// What a contestant did in a cell: medians over its runs that ended well.
#[derive(Clone, Debug)]
pub struct Standing<'a> {
    pub contestant: Contestant,
    /// Those that ended well.
    pub well: Vec<&'a Record>,
    /// Those that did not.
    pub badly: Vec<&'a Record>,
}

impl<'a> Standing<'a> {
    /// Of these records; nothing where it never ran.
    pub fn of(records: &'a [Record], cell: Cell, contestant: Contestant) -> Option<Self> {
        let own = records
            .iter()
            .filter(|record| is_of(record, cell) && record.contestant == contestant.name);
        let (well, badly): (Vec<_>, Vec<_>) = own.partition(|record| record.end == End::Well);
        (!well.is_empty() || !badly.is_empty()).then_some(Self {
            contestant,
            well,
            badly,
        })
    }

    /// The median of something that every run may have.
    pub fn median(&self, of: impl Fn(&Record) -> Option<f64>) -> Option<f64> {
        median(self.well.iter().filter_map(|record| of(record)))
    }

    /// Median of the whole time.
    pub fn seconds(&self) -> Option<f64> {
        self.median(|record| Some(record.seconds))
    }

    /// Median of bytes on the WAN.
    pub fn wan_bytes(&self) -> Option<f64> {
        self.median(|record| Some(record.wan_bytes as f64))
    }

    /// The run that took the median time, or nearly so: to show what cannot be a median.
    pub fn typical(&self) -> Option<&'a Record> {
        let middle = self.seconds()?;
        let distance = |record: &&&Record| ((record.seconds - middle).abs() * 1e6) as u64;
        self.well.iter().min_by_key(distance).copied()
    }

    /// How long it was waited for, where it was given up.
    pub fn given_up(&self) -> Option<f64> {
        let mut given_up = self.badly.iter().filter(|record| record.end == End::GivenUp);
        given_up.next().map(|record| record.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::contestant::{LONGHAUL, QEMU};
    use crate::wan::plan::Wanted;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn runs_that_did_not_end_well_give_no_figures_and_are_counted() {
        let cell = Wanted::default().cells()[0];
        let record = |end, seconds| Record {
            profile: cell.profile.name.to_owned(),
            case: cell.case.name().to_owned(),
            contestant: LONGHAUL.name.to_owned(),
            end,
            seconds,
            ..Record::default()
        };
        let records = [
            record(End::Well, 20.0),
            record(End::Failed, 1.0),
            record(End::Well, 22.0),
            record(End::GivenUp, 99.0),
            record(End::Well, 30.0),
        ];
        let standing = Standing::of(&records, cell, LONGHAUL).unwrap();
        assert_eq!(
            (standing.seconds(), standing.given_up()),
            (Some(22.0), Some(99.0))
        );
        assert_eq!((standing.well.len(), standing.badly.len()), (3, 2));
        assert_eq!(standing.typical().unwrap().seconds, 22.0);
        assert_eq!(standing.median(|record| record.heartbeat_gap_ms), None);
        assert!(Standing::of(&records, cell, QEMU[0]).is_none());
    }
}
