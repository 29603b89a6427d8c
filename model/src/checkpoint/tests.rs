use proptest::{prelude::*, sample::Index};

use super::*;

fn tensors() -> Tensors {
    let tensor = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    BTreeMap::from([("embedding.weight".to_owned(), tensor(&[4, 3])), ("norm.weight".to_owned(), tensor(&[3]))])
}

/// Reading either fills the tensors or gives a reason.
fn ends_well(file: &[u8]) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(WEIGHTS);
    fs::write(&path, file).unwrap();
    for accepts in [fits, fits_a_base] {
        if let Err(failure) = read_into(&path, tensors(), accepts) {
            prop_assert_eq!(failure.code, FailureCode::CheckpointUnreadable);
            prop_assert!(!failure.message.is_empty());
        }
    }
    Ok(())
}

fn written() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(WEIGHTS);
    write_tensors(&path, &tensors()).unwrap();
    fs::read(path).unwrap()
}

/// A file with this header and so many bytes behind it.
fn with_header(header: &serde_json::Value, bytes: usize) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; bytes]].concat()
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..60, Just(u64::MAX), Just(1 << 40), any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_weights_end_well(changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..6), length in any::<Index>()) {
        let mut file = written();
        for (index, byte) in &changes {
            let at = index.index(file.len());
            file[at] = *byte;
        }
        ends_well(&file)?;
        file.truncate(length.index(file.len() + 1));
        ends_well(&file)?;
    }

    #[test]
    fn weights_with_any_header_end_well(
        dtype in prop::sample::select(vec!["F32", "BF16", "F64", "BOOL", "F8_E4M3", "none"]),
        shape in prop::collection::vec(number(), 0..4), offsets in (number(), number()), bytes in 0usize..200,
        norm in any::<bool>(),
    ) {
        let mut header = serde_json::json!({"embedding.weight": {"dtype": dtype, "shape": shape, "data_offsets": [offsets.0, offsets.1]}});
        if norm {
            header["norm.weight"] = serde_json::json!({"dtype": "F32", "shape": [3], "data_offsets": [offsets.1, offsets.1.saturating_add(12)]});
        }
        ends_well(&with_header(&header, bytes))?;
    }

    #[test]
    fn a_vocabulary_of_any_shape_ends_well(shape in prop::collection::vec(0usize..6, 0..4)) {
        let bytes = 4 * shape.iter().product::<usize>();
        let header = serde_json::json!({"embedding.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, bytes]},
            "norm.weight": {"dtype": "F32", "shape": [3], "data_offsets": [bytes, bytes + 12]}});
        ends_well(&with_header(&header, bytes + 12))?;
    }
}
