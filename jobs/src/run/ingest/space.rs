//! The combinations that a template's variables can take, numbered, and a seeded order over them.
//!
//! A point of the space is one wording and one value for each variable. The order visits every
//! point once: a permutation by a Feistel network with cycle walking (Black and Rogaway, "Ciphers
//! with Arbitrary Finite Domains", 2002), so that drawing without repetition needs no memory and a
//! space that is too small is known for certain.

use std::collections::BTreeMap;

use serde_json::Value;

use super::spec::{Sample, TemplateSpec, Variable};

/// Larger spaces are refused; two halves of the network must fit a `u64` each.
const MAX_SPACE: u128 = 1 << 120;

pub struct Space<'a> {
    wordings: u128,
    variables: Vec<(&'a str, &'a Variable, u128)>,
    pub size: u128,
}

pub struct Point {
    pub wording: usize,
    pub values: BTreeMap<String, Value>,
}

impl<'a> Space<'a> {
    /// The space of a template, or the field that is wrong below it and why.
    pub fn new(template: &'a TemplateSpec) -> Result<Space<'a>, (String, String)> {
        let wordings = template.instruction.as_slice().len() as u128;
        if wordings == 0 {
            return Err(("instruction".to_owned(), "needs at least one wording".to_owned()));
        }
        let (mut size, mut variables) = (wordings, Vec::new());
        for (name, variable) in &template.variables {
            let field = || format!("variables.{name}");
            if !is_name(name) {
                return Err((field(), "is no name: use letters, digits and underscores, a letter first".to_owned()));
            }
            let count = possibilities(variable).map_err(|what| (field(), what))?;
            size = size
                .checked_mul(count)
                .filter(|size| *size <= MAX_SPACE)
                .ok_or_else(|| (field(), "makes more than 2^120 combinations; draw less".to_owned()))?;
            variables.push((name.as_str(), variable, count));
        }
        Ok(Space { wordings, variables, size })
    }

    /// The point with this number, below `size`.
    pub fn point(&self, mut index: u128) -> Point {
        let wording = take(&mut index, self.wordings) as usize;
        let values =
            self.variables.iter().map(|(name, variable, count)| ((*name).to_owned(), value(variable, take(&mut index, *count))));
        Point { wording, values: values.collect() }
    }
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn take(index: &mut u128, count: u128) -> u128 {
    let digit = *index % count;
    *index /= count;
    digit
}

/// How many values a variable has; never 0.
fn possibilities(variable: &Variable) -> Result<u128, String> {
    let too_many = || "has more than 2^120 possibilities; draw less".to_owned();
    let power = |base: u128, exponent: u32| base.checked_pow(exponent).filter(|count| *count <= MAX_SPACE).ok_or_else(too_many);
    match variable {
        Variable::Range(first, last) if first <= last => Ok((i128::from(*last) - i128::from(*first) + 1) as u128),
        Variable::Range(first, last) => Err(format!("is an empty range: {first} is above {last}")),
        Variable::Choice(values) if values.is_empty() => Err("has no value to choose from".to_owned()),
        Variable::Choice(values) => Ok(values.len() as u128),
        Variable::Digits(0) | Variable::Letters(0) => Err("must have at least 1 character".to_owned()),
        Variable::Digits(count) => power(10, *count),
        Variable::Letters(count) => power(26, *count),
        Variable::Sample(Sample { count: 0, .. }) => Err("must draw at least 1 value".to_owned()),
        Variable::Sample(Sample { from, .. }) if from.is_empty() => Err("has no value to draw from".to_owned()),
        Variable::Sample(Sample { from, count, repeat: true }) => power(from.len() as u128, *count),
        Variable::Sample(Sample { from, count, repeat: false }) => {
            if *count as usize > from.len() {
                return Err(format!("draws {count} of {} values; with `repeat` a value may come again", from.len()));
            }
            let factors = (0..u128::from(*count)).map(|taken| from.len() as u128 - taken);
            factors
                .into_iter()
                .try_fold(1u128, |product, factor| product.checked_mul(factor).filter(|p| *p <= MAX_SPACE))
                .ok_or_else(too_many)
        }
    }
}

fn value(variable: &Variable, mut index: u128) -> Value {
    match variable {
        Variable::Range(first, _) => Value::from((i128::from(*first) + index as i128) as i64),
        Variable::Choice(values) => values[index as usize].clone(),
        Variable::Digits(count) => (0..*count).map(|_| char::from(b'0' + take(&mut index, 10) as u8)).collect::<String>().into(),
        Variable::Letters(count) => (0..*count).map(|_| char::from(b'a' + take(&mut index, 26) as u8)).collect::<String>().into(),
        Variable::Sample(Sample { from, count, repeat: true }) => {
            (0..*count).map(|_| from[take(&mut index, from.len() as u128) as usize].clone()).collect()
        }
        Variable::Sample(Sample { from, count, repeat: false }) => {
            let mut left: Vec<&Value> = from.iter().collect();
            (0..*count).map(|_| left.swap_remove(take(&mut index, left.len() as u128) as usize).clone()).collect()
        }
    }
}

/// A permutation of `0 .. size` that the seed and stream decide.
pub struct Permutation {
    size: u128,
    half_bits: u32,
    keys: [u64; 8],
}

impl Permutation {
    pub fn new(size: u128, seed: u64, stream: u64) -> Permutation {
        let bits = 128 - size.saturating_sub(1).leading_zeros();
        let mut state = mix(seed) ^ mix(stream.wrapping_add(0x51ed_270b));
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        });
        Permutation { size, half_bits: bits.div_ceil(2).max(1), keys }
    }

    pub fn at(&self, index: u128) -> u128 {
        let mask = (1u128 << self.half_bits) - 1;
        let mut point = index;
        // The network permutes a power of four that is less than four times the size; walking on
        // from points outside keeps it a permutation of those inside.
        loop {
            let (mut left, mut right) = (point >> self.half_bits, point & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (u128::from(mix(right as u64 ^ key)) & mask));
            }
            point = left << self.half_bits | right;
            if point < self.size {
                return point;
            }
        }
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_visits_every_point_once() {
        for size in [1u128, 2, 3, 4, 5, 16, 17, 1000, 4097] {
            for seed in [0, 7] {
                let order = Permutation::new(size, seed, 1);
                let mut seen: Vec<u128> = (0..size).map(|index| order.at(index)).collect();
                let first: Vec<u128> = seen.iter().take(100).copied().collect();
                seen.sort();
                assert!(seen.iter().copied().eq(0..size), "size {size}");
                assert!(size < 16 || !first.iter().copied().eq(0..first.len() as u128), "size {size} is in order");
            }
        }
        let large = Permutation::new(1 << 120, 3, 0);
        assert!((0..100).all(|index| large.at(index) < 1 << 120));
        assert_ne!(Permutation::new(1 << 60, 3, 0).at(0), Permutation::new(1 << 60, 4, 0).at(0));
    }

    #[test]
    fn every_variable_takes_each_of_its_values_once() {
        let json = [
            r#"{"range": [-2, 5]}"#,
            r#"{"choice": ["a", 1, {"b": 2}]}"#,
            r#"{"sample": {"from": [1, 2, 3, 4], "count": 2}}"#,
            r#"{"sample": {"from": [1, 2, 3], "count": 3, "repeat": true}}"#,
            r#"{"digits": 2}"#,
            r#"{"letters": 2}"#,
        ];
        for (json, expected) in json.into_iter().zip([8, 3, 12, 27, 100, 676]) {
            let variable: Variable = serde_json::from_str(json).unwrap();
            let count = possibilities(&variable).unwrap();
            assert_eq!(count, expected, "{json}");
            let values: std::collections::HashSet<String> = (0..count).map(|index| value(&variable, index).to_string()).collect();
            assert_eq!(values.len() as u128, expected, "{json}");
        }
        let extremes = Variable::Range(i64::MIN, i64::MAX);
        assert_eq!(possibilities(&extremes), Ok(1 << 64));
        assert_eq!(value(&extremes, u128::from(u64::MAX)), Value::from(i64::MAX));
        for json in [
            r#"{"range": [3, 2]}"#,
            r#"{"choice": []}"#,
            r#"{"digits": 0}"#,
            r#"{"digits": 99}"#,
            r#"{"sample": {"from": [1], "count": 2}}"#,
        ] {
            assert!(possibilities(&serde_json::from_str(json).unwrap()).is_err(), "{json}");
        }
    }
}
