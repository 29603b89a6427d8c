use proptest::{prelude::*, sample::Index};
use tch::{Device, Kind, Tensor};

use super::*;
use crate::nn::Piece;

fn held(name: &str, shape: &[i64]) -> Held {
    let piece =
        Piece { name: name.to_owned(), whole: shape.to_vec(), offset: vec![0; shape.len()], shape: shape.to_vec(), start: 0 };
    Held::new(piece, &Tensor::ones(shape, (Kind::Float, Device::Cpu)), false, None)
}

fn weights() -> [Held; 2] {
    [held("embedding.weight", &[4, 3]), held("norm.weight", &[3])]
}

/// Reading either fills the tensors or gives a reason.
fn ends_well(file: &[u8]) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("weights.safetensors"), file).unwrap();
    for grows in [false, true] {
        if let Err(failure) = read(folder.path(), WEIGHTS).and_then(|stored| stored.fill(&weights(), |_| grows)) {
            prop_assert_eq!(failure.code, FailureCode::CheckpointUnreadable);
            prop_assert!(!failure.message.is_empty());
        }
    }
    Ok(())
}

fn written() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    Share::default().add(folder.path(), WEIGHTS, None, &weights()).unwrap();
    fs::read(folder.path().join("weights.safetensors")).unwrap()
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

/// The rectangle of a tensor that counts its numbers.
fn counted(name: &str, whole: [i64; 2], offset: [i64; 2], shape: [i64; 2]) -> Held {
    let all = Tensor::arange(whole[0] * whole[1], (Kind::Float, Device::Cpu)).view(whole);
    let cut = all.narrow(0, offset[0], shape[0]).narrow(1, offset[1], shape[1]).contiguous();
    let piece = Piece { name: name.into(), whole: whole.into(), offset: offset.into(), shape: shape.into(), start: 0 };
    Held::new(piece, &cut, true, None)
}

#[test]
fn any_ranks_read_what_any_others_wrote() {
    let rows = |ranks: i64| (0..ranks).map(move |rank| ([rank * 12 / ranks, 0], [12 / ranks, 6]));
    let columns = |ranks: i64| (0..ranks).map(move |rank| ([0, rank * 6 / ranks], [12, 6 / ranks]));
    let layouts: Vec<Vec<([i64; 2], [i64; 2])>> =
        vec![rows(1).collect(), rows(2).collect(), rows(4).collect(), columns(2).collect(), columns(3).collect()];
    for written in &layouts {
        let folder = tempfile::tempdir().unwrap();
        let alone = written.len() == 1;
        for (rank, &(offset, shape)) in written.iter().enumerate() {
            let mut share = Share::default();
            share.add(folder.path(), WEIGHTS, (!alone).then_some(rank), &[counted("a", [12, 6], offset, shape)]).unwrap();
            share.note(folder.path(), rank).unwrap();
        }
        let tensors = Share::collect(folder.path(), written.len()).unwrap().tensors;
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), written.len(), "notes are removed");
        let stored = Stored::of(folder.path(), tensors).unwrap();
        for wanted in &layouts {
            for &(offset, shape) in wanted {
                let expected = counted("a", [12, 6], offset, shape);
                let found = Held::new(
                    Piece { start: 0, ..expected.piece.clone() },
                    &Tensor::zeros(shape, (Kind::Float, Device::Cpu)),
                    true,
                    None,
                );
                stored.fill(std::slice::from_ref(&found), |_| false).unwrap();
                assert_eq!(found.tensor, expected.tensor);
            }
        }
        // A vocabulary that has grown, on a rank whose rows are old ones in part, and on one whose are new.
        for (offset, shape) in [([8, 0], [8, 6]), ([14, 2], [2, 2])] {
            let piece = Piece { name: "a".into(), whole: vec![16, 6], offset: offset.into(), shape: shape.into(), start: 0 };
            let grown = Held::new(piece, &Tensor::zeros(shape, (Kind::Float, Device::Cpu)), true, None);
            assert!(stored.fill(std::slice::from_ref(&grown), |_| false).is_err());
            stored.fill(std::slice::from_ref(&grown), |_| true).unwrap();
            let whole = stored.whole("a").unwrap();
            let known = (12 - offset[0]).max(0);
            let columns = |tensor: &Tensor| tensor.narrow(1, offset[1], shape[1]);
            assert_eq!(grown.tensor.narrow(0, 0, known), columns(&whole.narrow(0, offset[0].min(12), known)));
            let mean = columns(&whole.mean_dim(0, true, Kind::Float)).expand([shape[0] - known, shape[1]], false);
            assert_eq!(grown.tensor.narrow(0, known, shape[0] - known), mean);
        }
        if !alone {
            let merged = folder.path().join("merged.safetensors");
            share::merge(&stored, &merged).unwrap();
            assert_eq!(Stored::open(&merged).unwrap().whole("a").unwrap(), counted("a", [12, 6], [0, 0], [12, 6]).tensor);
        }
    }
}

#[test]
fn a_part_that_is_missing_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut share = Share::default();
    share.add(folder.path(), WEIGHTS, Some(0), &[counted("a", [12, 6], [0, 0], [11, 6])]).unwrap();
    let stored = Stored::of(folder.path(), share.tensors).unwrap();
    let all = counted("a", [12, 6], [0, 0], [12, 6]);
    assert_eq!(stored.fill(&[all], |_| false).unwrap_err().code, FailureCode::CheckpointUnreadable);
    assert!(stored.whole("a").is_err());
}
