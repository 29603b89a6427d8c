//! Exact match: the share of questions whose answer equals the expected one to the letter.

use std::collections::BTreeMap;

/// A held-out row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Index of its family.
    pub family: usize,
    pub instruction: String,
    pub expected: String,
}

/// How many of one family, or of all, were answered and how many rightly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub right: u64,
    pub asked: u64,
}

impl Tally {
    /// In percent; of nothing, 0.
    pub fn percent(self) -> f64 {
        if self.asked == 0 { 0.0 } else { 100.0 * self.right as f64 / self.asked as f64 }
    }

    fn add(&mut self, right: bool) {
        self.right += u64::from(right);
        self.asked += 1;
    }
}

/// A score by family, in the families' order, and in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Score {
    pub families: Vec<Tally>,
    pub all: Tally,
}

/// Scores answers against the questions that they stand beside.
pub fn exact_match<'a>(families: usize, answered: impl IntoIterator<Item = (&'a Question, &'a str)>) -> Score {
    let mut score = Score { families: vec![Tally::default(); families], all: Tally::default() };
    for (question, answer) in answered {
        let right = answer == question.expected;
        score.families[question.family].add(right);
        score.all.add(right);
    }
    score
}

/// The score of always giving a family's commonest answer. It is taken from the questions
/// themselves, so no constant answer could score higher.
pub fn commonest_answer(families: usize, questions: &[Question]) -> Score {
    let mut counts: Vec<BTreeMap<&str, u64>> = vec![BTreeMap::new(); families];
    for question in questions {
        *counts[question.family].entry(&question.expected).or_default() += 1;
    }
    let tally = |answers: &BTreeMap<&str, u64>| Tally {
        right: answers.values().copied().max().unwrap_or(0),
        asked: answers.values().sum(),
    };
    let families: Vec<Tally> = counts.iter().map(tally).collect();
    let all =
        Tally { right: families.iter().map(|tally| tally.right).sum(), asked: families.iter().map(|tally| tally.asked).sum() };
    Score { families, all }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(family: usize, expected: &str) -> Question {
        Question { family, instruction: String::new(), expected: expected.to_owned() }
    }

    #[test]
    fn only_equal_answers_count() {
        let questions = [question(0, "a b"), question(0, "c"), question(1, "d")];
        let score = exact_match(2, questions.iter().zip(["a b", "c ", "D"]));
        assert_eq!(score.families, vec![Tally { right: 1, asked: 2 }, Tally { right: 0, asked: 1 }]);
        assert_eq!(score.all, Tally { right: 1, asked: 3 });
    }

    #[test]
    fn the_commonest_answer_is_found_in_each_family() {
        let questions = [question(0, "x"), question(0, "y"), question(0, "y"), question(1, "x"), question(1, "z")];
        let score = commonest_answer(2, &questions);
        assert_eq!(score.families, vec![Tally { right: 2, asked: 3 }, Tally { right: 1, asked: 2 }]);
        assert_eq!(score.all, Tally { right: 3, asked: 5 });
    }

    #[test]
    fn nothing_asked_scores_nothing() {
        assert_eq!(commonest_answer(1, &[]).all.percent(), 0.0);
    }
}
