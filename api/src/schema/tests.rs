use serde::Deserialize;
use serde_json::json;
use utoipa::PartialSchema;

use super::*;

#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CircleType {
    Circle,
}

#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Circle {
    r#type: CircleType,
    #[schema(minimum = 1, maximum = 9)]
    radius: f64,
}

#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum SquareType {
    Square,
}

#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Square {
    r#type: SquareType,
    #[schema(min_items = 1)]
    sides: Vec<u64>,
    name: Option<String>,
}

#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged)]
enum Shape {
    Circle(Circle),
    Square(Square),
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Drawing {
    #[schema(max_items = 2)]
    shapes: Vec<Shape>,
    #[schema(min_length = 1, max_length = 4)]
    title: Option<String>,
}

fn read<T: ToSchema + serde::de::DeserializeOwned + 'static>(body: Value) -> Result<T, Violation> {
    let schema = Schema::of::<T>();
    schema.check(&body)?;
    schema.read(body)
}

fn refusal(body: Value) -> (String, String) {
    let violation = read::<Drawing>(body).unwrap_err();
    (violation.param, violation.message)
}

#[test]
fn a_valid_body_is_read() {
    let drawing = read::<Drawing>(json!({"shapes": [{"type": "square", "sides": [1], "name": null}], "title": null})).unwrap();
    let square = Square { r#type: SquareType::Square, sides: vec![1], name: None };
    assert_eq!(drawing.shapes, [Shape::Square(square)]);
    assert_eq!(drawing.title, None);
}

#[test]
fn paths_reach_into_tagged_unions() {
    assert_eq!(refusal(json!({"shapes": [{"type": "circle", "radius": 10}]})).0, "shapes[0].radius");
    assert_eq!(refusal(json!({"shapes": [{"type": "square", "sides": [1, -1]}]})).0, "shapes[0].sides[1]");
    assert_eq!(refusal(json!({"shapes": [{"type": "square", "sides": [1], "radius": 2}]})).0, "shapes[0].radius");
    assert_eq!(refusal(json!({"shapes": [{"type": "square"}]})).0, "shapes[0].sides");
    assert_eq!(refusal(json!({"shapes": [{"type": "cube"}]})).0, "shapes[0].type");
}

#[test]
fn a_union_names_all_that_it_takes() {
    let of = |shape: Value| refusal(json!({"shapes": [shape]}));
    assert_eq!(of(json!({"type": "cube"})).1, r#"`shapes[0].type` must be one of "circle", "square"."#);
    assert_eq!(of(json!(1)).1, "`shapes[0]` must be of type object, not a number.");
    let unknown = of(json!({"colour": 1}));
    assert_eq!(unknown.0, "shapes[0].colour");
    assert!(unknown.1.ends_with("known are: name, radius, sides, type."), "{}", unknown.1);
}

/// A text, numbers or lists of numbers.
#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged)]
enum Either {
    Text(String),
    Texts(Vec<String>),
    Numbers(Vec<u8>),
    Lists(Vec<Vec<u8>>),
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Holder {
    #[allow(dead_code, reason = "only refusals are looked at")]
    either: Either,
}

#[test]
fn an_array_s_first_item_says_which_branch_is_meant() {
    let of = |either: Value| {
        let violation = read::<Holder>(json!({"either": either})).unwrap_err();
        (violation.param, violation.message)
    };
    assert_eq!(of(json!([1, -1])).0, "either[1]");
    assert_eq!(
        of(json!([[1], [1, "a"]])),
        ("either[1][1]".into(), "`either[1][1]` must be of type integer, not a string.".into())
    );
    assert_eq!(of(json!(["a", 1])).1, "`either[1]` must be of type string, not a number.");
    assert_eq!(of(json!(null)).1, "`either` must be of type string or array, not null.");
}

#[derive(Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Numbers {
    #[schema(minimum = 0, maximum = 18446744073709551615u64)]
    seed: u64,
    share: Option<f64>,
    any: Option<Value>,
}

#[test]
fn an_integer_may_be_written_with_a_point() {
    let numbers = read::<Numbers>(json!({"seed": 12.0, "share": 1, "any": [1.0]})).unwrap();
    assert_eq!(numbers, Numbers { seed: 12, share: Some(1.0), any: Some(json!([1.0])) });
    let largest = json!({"seed": u64::MAX});
    assert_eq!(read::<Numbers>(largest).unwrap().seed, u64::MAX);
    for wrong in [json!(12.5), json!(1e300), json!(-1), json!(1.8446744073709552e19), json!("12")] {
        assert_eq!(read::<Numbers>(json!({"seed": wrong})).unwrap_err().param, "seed", "{wrong}");
    }
}

#[test]
fn an_integer_just_below_the_least_is_not_taken_for_it() {
    let parsed = |text| integer(&serde_json::from_str(text).unwrap());
    assert_eq!(parsed("-9223372036854775808"), Some(i64::MIN.into()));
    assert_eq!(parsed("-9223372036854774784.0"), Some(-9223372036854774784));
    assert_eq!(parsed("-9223372036854775809"), None);
    assert_eq!(parsed("18446744073709551616"), None);
}

#[test]
fn what_never_stands_together_names_the_one_to_leave_out() {
    let combination =
        json!({"properties": {"name": {"enum": ["plain", null]}, "sides": {"type": "array"}}, "required": ["sides"]});
    let never = Schema::alone(serde_json::to_value(never(Square::schema(), combination)).unwrap());
    let check = |name: Value, sides: Value| {
        never.check_at(&never.root, &json!({"type": "square", "name": name, "sides": sides}), "shape")
    };
    assert_eq!(check(json!("fancy"), json!([1])), Ok(()));
    assert_eq!(check(json!("plain"), json!([1])).unwrap_err().param, "shape.sides");
    assert_eq!(check(json!(null), json!([1])).unwrap_err().param, "shape.sides");
    assert_eq!(check(json!("fancy"), json!([])).unwrap_err().message, "`shape.sides` must have at least 1 items, not 0.");
}

#[test]
fn a_constant_is_the_only_value() {
    let schema = Schema::alone(json!({"properties": {"refusal": {"const": null}}}));
    assert_eq!(schema.check(&json!({"refusal": null})), Ok(()));
    assert_eq!(schema.check(&json!({"refusal": "no"})).unwrap_err(), Violation::new("refusal", "`refusal` must be null."));
}

#[test]
fn bounds_unknown_fields_and_types() {
    assert_eq!(refusal(json!({"shapes": [], "colour": 1})).0, "colour");
    assert_eq!(refusal(json!({"shapes": [], "title": "titles"})).0, "title");
    assert_eq!(refusal(json!({"shapes": {}})).1, "`shapes` must be of type array, not an object.");
    assert_eq!(refusal(json!({})).1, "`shapes` is required.");
    assert_eq!(refusal(json!([])), (String::new(), "The body must be of type object, not an array.".to_owned()));
}
