//! Which layers lie on which stage of a pipeline.

use std::ops::Range;

/// A part of a model: some of its layers, with what stands before the first one and behind the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    pub layers: Range<i64>,
    pub is_first: bool,
    pub is_last: bool,
}

impl Stage {
    /// A model of one part.
    pub fn whole(layers: i64) -> Stage {
        Stage { layers: 0..layers, is_first: true, is_last: true }
    }

    pub fn is_whole(&self) -> bool {
        self.is_first && self.is_last
    }
}

/// What computing a part of a model costs, in any unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    pub layer: f64,
    /// Behind the last layer.
    pub head: f64,
}

/// Cuts `layers` layers into `parts`, of which each has one at least, so that the dearest part costs as little as can be. Of
/// such cuts the one whose last part has most: the earlier ones hold more micro-batches.
///
/// # Panics
/// If there are fewer layers than parts, which [`super::Layout::check`] refuses.
pub fn split(layers: i64, parts: usize, costs: Costs) -> Vec<Stage> {
    assert!(parts > 0 && layers >= parts as i64, "{layers} layers cannot be cut into {parts} parts");
    let others = parts as i64 - 1;
    // Layers of the last part, beside the head: no more than what evens it out with the others.
    let dearest = |last: i64| {
        let most = if others == 0 { 0 } else { (layers - last + others - 1) / others };
        (most as f64 * costs.layer).max(last as f64 * costs.layer + costs.head)
    };
    let last = match others {
        0 => layers,
        _ => (1..=layers - others).rev().min_by(|&a, &b| dearest(a).total_cmp(&dearest(b))).unwrap_or(1),
    };
    let mut first = 0;
    let stage = |part: i64| {
        let count = match part {
            part if part == others => last,
            part => (layers - last) / others + i64::from(part < (layers - last) % others),
        };
        first += count;
        Stage { layers: first - count..first, is_first: part == 0, is_last: part == others }
    };
    (0..=others).map(stage).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(layers: i64, parts: usize, head: f64) -> Vec<i64> {
        let stages = split(layers, parts, Costs { layer: 1.0, head });
        let mut next = 0;
        for (number, stage) in stages.iter().enumerate() {
            assert_eq!((stage.layers.start, stage.is_first, stage.is_last), (next, number == 0, number + 1 == parts));
            next = stage.layers.end;
        }
        assert_eq!(next, layers);
        stages.iter().map(|stage| stage.layers.end - stage.layers.start).collect()
    }

    #[test]
    fn stages_cost_about_the_same() {
        assert_eq!(counts(12, 1, 5.0), [12]);
        assert_eq!(counts(12, 4, 0.0), [3, 3, 3, 3]);
        assert_eq!(counts(12, 4, 1.0), [3, 3, 3, 3]);
        assert_eq!(counts(13, 4, 1.5), [4, 4, 3, 2]);
        assert_eq!(counts(4, 2, 2.0), [3, 1]);
        assert_eq!(counts(4, 2, 100.0), [3, 1]);
        assert_eq!(counts(4, 4, 100.0), [1, 1, 1, 1]);
        assert_eq!(counts(7, 3, 0.0), [2, 2, 3]);
    }

    #[test]
    fn no_other_cut_is_cheaper() {
        for (layers, parts) in [(5, 2), (8, 3), (9, 4), (6, 6)] {
            for head in [0.0, 0.5, 1.0, 2.5, 7.0] {
                let dearest = |counts: &[i64]| {
                    let costs =
                        counts.iter().enumerate().map(|(part, &count)| count as f64 + if part + 1 == parts { head } else { 0.0 });
                    costs.fold(0.0, f64::max)
                };
                let mut cheapest = f64::INFINITY;
                let mut counts_so_far = vec![vec![]];
                for part in 0..parts {
                    counts_so_far = counts_so_far
                        .into_iter()
                        .flat_map(|counts: Vec<i64>| {
                            let left = layers - counts.iter().sum::<i64>() - (parts - part - 1) as i64;
                            let sizes = if part + 1 == parts { left..=left } else { 1..=left };
                            sizes.map(move |size| [counts.as_slice(), &[size]].concat())
                        })
                        .collect();
                }
                counts_so_far.iter().for_each(|counts| cheapest = dearest(counts).min(cheapest));
                assert_eq!(dearest(&counts(layers, parts, head)), cheapest, "{layers} layers, {parts} parts, {head}");
            }
        }
    }
}
