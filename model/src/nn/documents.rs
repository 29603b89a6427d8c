//! Attention within documents on the CPU, through the kernel in `cpp/attention.cpp`.

use tch::Tensor;

use crate::shim;

/// Where a batch's documents lie, for the kernel in `cpp/attention.cpp`. What no document fills is padding,
/// which is not computed.
#[derive(Debug)]
pub struct Documents {
    /// First token (row × length + position) and number of tokens
    spans_n2: Tensor,
}

impl Documents {
    /// See [`super::AttentionPlan::of_documents`].
    pub fn new(length: usize, rows: &[Vec<usize>]) -> Documents {
        let mut spans = Vec::new();
        for (row, documents) in rows.iter().enumerate() {
            let mut start = row * length;
            for &len in documents {
                spans.extend([start as i64, len as i64]);
                start += len;
            }
            assert!(start <= (row + 1) * length, "documents of {documents:?} tokens in a row of {length}");
        }
        Documents { spans_n2: Tensor::from_slice(&spans).view([-1, 2]) }
    }

    pub fn attend(&self, q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let [q_bthd, k_btgd, v_btgd] = [q_bhtd, k_bgtd, v_bgtd].map(|x| x.transpose(1, 2));
        let out = shim::attend_documents(&q_bthd, &k_btgd, &v_btgd, &self.spans_n2);
        out.expect("attention over documents").transpose(1, 2)
    }
}

/// Runs a test once more with the kernels for each kind of processor older than this one.
#[cfg(test)]
pub(super) fn with_fewer_instructions(test: &str) {
    for capability in ["avx2", "default"] {
        let mut command = std::process::Command::new(std::env::current_exe().expect("this test runs"));
        let output = command.args(["--exact", test]).env("ATEN_CPU_CAPABILITY", capability).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{capability}: {said}");
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::nn::Blocks;

    const SEED: i64 = 3;
    /// Documents shorter and longer than a vector and a block of queries; 9 and 20 tokens are padding.
    const LENGTH: usize = 130;

    fn rows() -> Vec<Vec<usize>> {
        vec![vec![1, 15, 16, 17, 72], vec![23, 24, 25, 49], vec![LENGTH], vec![110]]
    }

    /// (b, heads, t, t): the document of query and key is the same, and the key is not later.
    fn mask() -> Tensor {
        let mut allowed = vec![false; rows().len() * LENGTH * LENGTH];
        for (row, documents) in rows().iter().enumerate() {
            let mut start = 0;
            for &len in documents {
                for query in start..start + len {
                    (start..=query).for_each(|key| allowed[(row * LENGTH + query) * LENGTH + key] = true);
                }
                start += len;
            }
        }
        Tensor::from_slice(&allowed).view([rows().len() as i64, 1, LENGTH as i64, LENGTH as i64])
    }

    /// The definition, in double precision: softmax(q k^T / sqrt(d)) v over what the mask allows.
    fn defined(q_bhtd: &Tensor, k_bgtd: &Tensor, v_bgtd: &Tensor) -> Tensor {
        let shared = q_bhtd.size()[1] / k_bgtd.size()[1];
        let [k_bhtd, v_bhtd] = [k_bgtd, v_bgtd].map(|x| x.repeat_interleave_self_int(shared, 1, None));
        let scores_bhqk = q_bhtd.matmul(&k_bhtd.transpose(-1, -2)) / (q_bhtd.size()[3] as f64).sqrt();
        let allowed = mask();
        let weights = scores_bhqk.masked_fill(&allowed.logical_not(), -1e300).softmax(-1, Kind::Double);
        (weights * allowed).matmul(&v_bhtd)
    }

    /// What `attend` makes of the inputs, and their gradients under fixed weights of the result.
    fn outcome(inputs: &[Tensor; 3], attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> Vec<Tensor> {
        let [q, k, v] = inputs.each_ref().map(|x| x.detach().set_requires_grad(true));
        let out = attend(&q, &k, &v);
        tch::manual_seed(SEED + 1);
        let weights = Tensor::randn(out.size(), (Kind::Double, Device::Cpu)).to_kind(out.kind());
        let gradients = Tensor::run_backward(&[(&out * weights).sum(Kind::Double)], &[q, k, v], false, false);
        std::iter::once(out.detach()).chain(gradients).collect()
    }

    fn agree(found: &[Tensor], expected: &[Tensor], tolerance: f64, what: &str) {
        for (part, (found, expected)) in ["result", "dq", "dk", "dv"].iter().zip(found.iter().zip(expected)) {
            let found = found.to_kind(Kind::Double);
            let difference = ((&found - expected).abs() / (expected.abs() + 1.0)).max().double_value(&[]);
            assert!(difference <= tolerance, "{what}: {part} differs by {difference}");
        }
    }

    #[test]
    fn it_is_what_attention_is_defined_to_be() {
        let documents = Documents::new(LENGTH, &rows());
        let blocks = Blocks::new(LENGTH, &rows(), Device::Cpu);
        // The largest: scores beyond what an exponential in fp32 can hold.
        for (heads, groups, dim, size) in [(2, 2, 64, 1.0), (4, 2, 20, 1.0), (3, 1, 8, 1.0), (2, 2, 16, 12.0)] {
            tch::manual_seed(SEED);
            let random = |heads: i64, size: f64| {
                // As the projections leave them: positions first, heads side by side.
                let shape = [rows().len() as i64, LENGTH as i64, heads, dim];
                (Tensor::randn(shape, (Kind::Double, Device::Cpu)) * size).transpose(1, 2)
            };
            let exact = [random(heads, size), random(groups, size), random(groups, 1.0)];
            for (kind, tolerance) in [(Kind::Float, 2e-5), (Kind::BFloat16, 2e-2)] {
                let what = format!("{heads} heads, {groups} groups of {dim}, {kind:?}");
                let inputs = exact.each_ref().map(|x| x.to_kind(kind));
                let expected = outcome(&inputs.each_ref().map(|x| x.to_kind(Kind::Double)), defined);
                let found = outcome(&inputs, |q, k, v| documents.attend(q, k, v));
                agree(&found, &expected, tolerance * size, &what);
                if kind == Kind::Float {
                    // Blocks compute padding too; where it is, there is nothing to compare.
                    let real = mask().diagonal(0, -1, -2).unsqueeze(-1);
                    let found = outcome(&inputs, |q, k, v| blocks.attend(q, k, v) * &real);
                    agree(&found, &expected, tolerance * size, &format!("{what}, as blocks"));
                }
            }
        }
    }

    #[test]
    fn it_is_the_same_with_fewer_instructions() {
        with_fewer_instructions("nn::documents::tests::it_is_what_attention_is_defined_to_be");
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let inputs = [4, 2, 2].map(|heads| {
            tch::manual_seed(SEED + heads);
            Tensor::randn([rows().len() as i64, heads, LENGTH as i64, 32], (Kind::Float, Device::Cpu))
        });
        let documents = Documents::new(LENGTH, &rows());
        let runs = [1, 2, 3].map(|threads| {
            tch::set_num_threads(threads);
            outcome(&inputs, |q, k, v| documents.attend(q, k, v))
        });
        for run in &runs[1..] {
            assert!(run.iter().zip(&runs[0]).all(|(a, b)| a.equal(b)));
        }
    }
}
