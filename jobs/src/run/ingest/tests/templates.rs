//! Datasets by rule.

use std::collections::HashSet;

use super::*;

struct Rules {
    folder: tempfile::TempDir,
}

impl Rules {
    fn new() -> Rules {
        Rules { folder: tempfile::tempdir().unwrap() }
    }

    fn make(
        &self,
        name: &str,
        rows: u64,
        seed: u64,
        exclude: &[&str],
        templates: serde_json::Value,
    ) -> Result<Vec<Row>, Failure> {
        let output = self.folder.path().join(name);
        let source = TemplateSource {
            rows,
            seed,
            templates: serde_json::from_value(templates).unwrap(),
            exclude: exclude.iter().map(|name| self.folder.path().join(name)).collect(),
        };
        let spec = IngestSpec {
            source: Source::Template(source),
            output: output.clone(),
            max_bytes: 1 << 30,
            max_ratio: 100,
            max_line_bytes: 1 << 20,
        };
        let ingested = run(spec, &mut |_| {}, &AtomicBool::new(false))?;
        assert_eq!((ingested.manifest.rows, ingested.manifest.duplicates), (rows, 0));
        Ok(super::rows(&output))
    }
}

fn parts(row: &Row) -> (&str, &str) {
    match row {
        Row::Conversation { turns, .. } => (&turns[0].instruction, &turns[0].output),
        Row::Text { .. } => panic!("rules make conversations"),
    }
}

#[test]
fn answers_are_computed_and_the_seed_decides_all() {
    let sums = json!([{"instruction": "What is {{ a }} plus {{ b }}?", "output": "{{ a + b }}",
        "variables": {"a": {"range": [0, 99]}, "b": {"range": [0, 99]}}}]);
    let rules = Rules::new();
    let rows = rules.make("one", 500, 7, &[], sums.clone()).unwrap();
    for row in &rows {
        let (question, answer) = parts(row);
        let numbers: Vec<i64> = question.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
        assert_eq!(answer.parse::<i64>().unwrap(), numbers[0] + numbers[1]);
    }
    assert_eq!(rules.make("two", 500, 7, &[], sums.clone()).unwrap(), rows);
    assert_ne!(rules.make("three", 500, 8, &[], sums).unwrap(), rows);
}

#[test]
fn filters_serve_the_usual_answers() {
    let one = |output: &str, variables: serde_json::Value| {
        let template = json!([{"instruction": "{{ x }}", "output": output, "variables": variables}]);
        parts(&Rules::new().make("d", 1, 1, &[], template).unwrap()[0]).1.to_owned()
    };
    let letters = json!({"x": {"choice": ["cab"]}});
    assert_eq!(one("{{ x|upper }}", letters.clone()), "CAB");
    assert_eq!(one("{{ x|reverse }}", letters.clone()), "bac");
    assert_eq!(one("{{ x|list|sort|join(' ') }}", letters.clone()), "a b c");
    assert_eq!(one("{{ x|list|reverse|join(' ') }}", letters.clone()), "b a c");
    assert_eq!(one("{{ x|length }}", letters), "3");
    let number = json!({"x": {"range": [7, 7]}});
    assert_eq!(one("{{ '%02d:00'|format(x) }}", number.clone()), "07:00");
    assert_eq!(one("{{ x|pad(3) }}", number.clone()), "007");
    assert_eq!(one("{{ 'even' if x % 2 == 0 else 'odd' }}", number.clone()), "odd");
    assert_eq!(one("{{ [x, 12]|max }}", number), "12");
    let month = json!({"x": {"choice": [{"name": "July", "number": 7}]}});
    assert_eq!(one("2036-{{ x.number|pad(2) }}-{{ x.name[:3] }}", month), "2036-07-Jul");
    let list = json!({"x": {"sample": {"from": [3, 1, 2], "count": 3}}});
    assert_eq!(one("{{ x|sort|join(', ') }}", list), "1, 2, 3");
}

#[test]
fn wordings_and_templates_share_the_rows_out() {
    let templates = json!([
        {"family": "up", "instruction": ["Upper {{ w }}", "Make {{ w }} upper"], "output": "{{ w|upper }}", "variables": {"w": {"letters": 3}}},
        {"family": "digits", "instruction": "Say {{ d }}", "input": "aloud", "output": "{{ d }}", "variables": {"d": {"digits": 4}}}
    ]);
    let rows = Rules::new().make("d", 401, 1, &[], templates).unwrap();
    let count = |prefix: &str| rows.iter().filter(|row| parts(row).0.starts_with(prefix)).count();
    assert_eq!((count("Upper") + count("Make"), count("Say")), (201, 200));
    assert!(count("Upper") > 60 && count("Make") > 60);
}

#[test]
fn excluded_variables_come_back_under_no_wording_and_in_no_order() {
    let templates = |word: &str| {
        json!([{"family": "sort", "key": "{{ d|sort|join(',') }}", "instruction": [format!("{word} {{{{ d|join(' ') }}}}")],
            "output": "{{ d|sort|join(' ') }}", "variables": {"d": {"sample": {"from": [0,1,2,3,4,5,6,7,8,9], "count": 4, "repeat": true}}}}])
    };
    let rules = Rules::new();
    let held_out = rules.make("test", 100, 1, &[], templates("Sort")).unwrap();
    let train = rules.make("train", 3_000, 1, &["test"], templates("Order")).unwrap();
    let answers = |rows: &[Row]| rows.iter().map(|row| parts(row).1.to_owned()).collect::<HashSet<_>>();
    assert!(answers(&held_out).is_disjoint(&answers(&train)));
    assert_eq!(std::fs::metadata(rules.folder.path().join("train/keys.bin")).unwrap().len(), 16 * 3_000);

    // Without a key the variables themselves are excluded, whatever the wording.
    let plain = |word: &str| json!([{"instruction": format!("{word} {{{{ a }}}}"), "output": "{{ a }}", "variables": {"a": {"range": [1, 100]}}}]);
    let first = rules.make("first", 60, 1, &[], plain("Say")).unwrap();
    let second = rules.make("second", 40, 1, &["first"], plain("Tell")).unwrap();
    assert_eq!(answers(&first).union(&answers(&second)).count(), 100);
}

#[test]
fn other_families_are_not_excluded_by_key_and_files_are_by_content() {
    let family = |family: &str| json!([{"family": family, "instruction": "Say {{ a }}", "output": family, "variables": {"a": {"range": [1, 10]}}}]);
    let rules = Rules::new();
    rules.make("one", 10, 1, &[], family("one")).unwrap();
    rules.make("two", 10, 1, &["one"], family("two")).unwrap();

    let case = Case::new(&[("a.jsonl", br#"{"instruction": "Say 3", "output": "one"}"#)]);
    case.run().unwrap();
    let from_files = case.output();
    let rows = rules.make("three", 9, 1, &[from_files.to_str().unwrap()], family("one")).unwrap();
    assert!(rows.iter().all(|row| parts(row).0 != "Say 3"));
}

#[test]
fn too_few_combinations_are_a_failure_with_numbers() {
    let templates = json!([{"family": "coin", "instruction": "{{ c }}", "output": "{{ c }}", "variables": {"c": {"choice": ["a", "b", "b"]}}}]);
    let rules = Rules::new();
    let failure = rules.make("d", 3, 1, &[], templates.clone()).unwrap_err();
    assert_eq!(failure.code, FailureCode::NotEnoughDistinctRows);
    assert!(
        failure.message.contains("(coin)")
            && failure.message.contains("2 of the 3")
            && failure.message.contains("all 3 combinations"),
        "{failure:?}"
    );
    rules.make("d", 2, 1, &[], templates.clone()).unwrap();
    let failure = rules.make("e", 1, 1, &["d"], templates).unwrap_err();
    assert!(failure.message.contains("3 belong to excluded"), "{failure:?}");
}

#[test]
fn bad_templates_are_named_by_their_path() {
    let cases = [
        (json!({"instruction": "{{ a", "output": "x"}), "instruction"),
        (json!({"instruction": ["fine", "{% if %}"], "output": "x"}), "instruction[1]"),
        (json!({"instruction": [], "output": "x"}), "instruction"),
        (json!({"instruction": "i", "output": "{{ missing }}"}), "output"),
        (json!({"instruction": "i", "output": " "}), "output"),
        (json!({"instruction": "i", "output": "{{ 1 / 0 }}x{{ a.b.c }}"}), "output"),
        (
            json!({"instruction": "i", "output": "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}"}),
            "output",
        ),
        (json!({"instruction": "i", "output": "{{ 'x' * 1000000000 }}"}), "output"),
        (json!({"instruction": "i", "output": "{{ 1|pad(1000000000) }}"}), "output"),
        (json!({"instruction": "i", "output": "{% include 'x' %}"}), "output"),
        (json!({"instruction": "i", "output": "o", "variables": {"a": {"range": [2, 1]}}}), "variables.a"),
        (json!({"instruction": "i", "output": "o", "variables": {"a b": {"range": [1, 2]}}}), "variables.a b"),
        (json!({"instruction": "i", "output": "o", "variables": {"a": {"letters": 90}}}), "variables.a"),
    ];
    for (template, field) in cases {
        let failure = Rules::new().make("d", 1, 1, &[], json!([template])).unwrap_err();
        assert_eq!(failure.code, FailureCode::BadTemplate, "{failure:?}");
        assert_eq!(failure.param, Some(format!("source.templates[0].{field}")), "{failure:?}");
    }
    assert_eq!(check_templates(&[]).unwrap_err().code, FailureCode::BadTemplate);
}
