//! Which part of a logical tensor lies where in memory.

use std::ops::Range;

use tch::Tensor;

/// A rectangle of a logical tensor, whose numbers lie one after the other, in row-major order, in a tensor in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The logical tensor's.
    pub name: String,
    /// Shape of the whole logical tensor.
    pub whole: Vec<i64>,
    /// Where the rectangle starts in it, in every dimension.
    pub offset: Vec<i64>,
    pub shape: Vec<i64>,
    /// Numbers in memory before it.
    pub start: i64,
}

impl Piece {
    pub fn numbers(&self) -> i64 {
        self.shape.iter().product()
    }

    /// The rectangle's numbers in a contiguous tensor that lies in memory like the one that this describes, such as an
    /// optimiser's state. A view without gradient tracking.
    pub fn view(&self, of: &Tensor) -> Tensor {
        of.detach().view([-1]).narrow(0, self.start, self.numbers()).view(self.shape.as_slice())
    }

    /// Its numbers in the order of the whole tensor: where a run of them starts there, and which of its own they are.
    pub fn runs(&self) -> Vec<(u64, Range<usize>)> {
        // Dimensions behind the last one that is cut are whole, and make one run with it.
        let is_cut = |dimension: &usize| self.shape[*dimension] != self.whole[*dimension];
        let last = (0..self.shape.len()).rev().find(is_cut).unwrap_or(0);
        let length = self.shape.iter().skip(last).product::<i64>().max(1) as usize;
        let starts = (0..self.numbers().max(0) as usize).step_by(length);
        starts.map(|start| (self.place(start), start..start + length)).collect()
    }

    /// Where its number `index` stands in the whole tensor.
    fn place(&self, index: usize) -> u64 {
        let (mut rest, mut stride, mut place) = (index as i64, 1, 0);
        for dimension in (0..self.shape.len()).rev() {
            place += (self.offset[dimension] + rest % self.shape[dimension]) * stride;
            rest /= self.shape[dimension];
            stride *= self.whole[dimension];
        }
        place as u64
    }

    /// What of it lies within a range of the numbers in memory, which become a tensor of their own.
    pub fn within(&self, range: &Range<i64>) -> Vec<Piece> {
        let mut start = range.start.max(self.start);
        let end = range.end.min(self.start + self.numbers());
        if start >= end {
            return Vec::new();
        }
        let rectangles = rectangles(&self.shape, start - self.start..end - self.start);
        let piece = |(at, shape): (Vec<i64>, Vec<i64>)| {
            let offset = self.offset.iter().zip(at).map(|(offset, at)| offset + at).collect();
            let piece = Piece { offset, shape, start: start - range.start, ..self.clone() };
            start += piece.numbers();
            piece
        };
        rectangles.into_iter().map(piece).collect()
    }
}

/// Offsets and shapes of the rectangles that make up a range of the numbers of a tensor of this shape, in its order.
fn rectangles(shape: &[i64], range: Range<i64>) -> Vec<(Vec<i64>, Vec<i64>)> {
    let [_, inner @ ..] = shape else { return vec![(Vec::new(), Vec::new())] };
    let mut found = Vec::new();
    let width: i64 = inner.iter().product();
    let mut at = range.start;
    while at < range.end {
        let (row, column) = (at / width, at % width);
        let rows = (range.end - at) / width;
        if column == 0 && rows > 0 {
            found.push(([&[row], vec![0; inner.len()].as_slice()].concat(), [&[rows], inner].concat()));
            at += rows * width;
            continue;
        }
        // A part of one row.
        let end = width.min(column + range.end - at);
        let part = rectangles(inner, column..end).into_iter();
        found.extend(part.map(|(offset, shape)| ([&[row], offset.as_slice()].concat(), [&[1], shape.as_slice()].concat())));
        at += end - column;
    }
    found
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn runs_are_a_pieces_numbers_in_the_order_of_the_whole() {
        let cases: [(&[i64], &[i64], &[i64]); 6] = [
            (&[], &[], &[]),
            (&[7], &[2], &[3]),
            (&[4, 5], &[1, 0], &[2, 5]),
            (&[4, 5], &[0, 2], &[4, 3]),
            (&[3, 4, 5], &[1, 2, 0], &[2, 1, 5]),
            (&[4, 5], &[4, 0], &[0, 5]),
        ];
        for (whole, offset, shape) in cases {
            let all = Tensor::arange(whole.iter().product::<i64>(), (Kind::Int64, Device::Cpu)).view(whole);
            let cut =
                (0..whole.len()).fold(all, |cut, dimension| cut.narrow(dimension as i64, offset[dimension], shape[dimension]));
            let [whole, offset, shape] = [whole, offset, shape].map(<[i64]>::to_vec);
            let piece = Piece { name: "a".into(), whole, offset, shape, start: 0 };
            let mut found = vec![-1; piece.numbers() as usize];
            for (first, range) in piece.runs() {
                range.enumerate().for_each(|(step, index)| found[index] = first as i64 + step as i64);
            }
            assert_eq!(found, Vec::<i64>::try_from(cut.reshape([-1])).unwrap(), "{piece:?}");
        }
    }

    #[test]
    fn any_range_is_made_up_of_rectangles_in_order() {
        for whole in [vec![], vec![7], vec![4, 5], vec![3, 4, 5], vec![1, 6], vec![6, 1]] {
            let numbers: i64 = whole.iter().product();
            let tensor = Tensor::arange(numbers, (Kind::Int64, Device::Cpu));
            let offset = vec![10; whole.len()];
            let all = Piece { name: "a".into(), whole: whole.clone(), offset, shape: whole.clone(), start: 2 };
            for start in 0..numbers + 3 {
                for end in start + 1..numbers + 4 {
                    let range = start..end;
                    let cut = Tensor::cat(&[Tensor::full([2], -1, (Kind::Int64, Device::Cpu)), tensor.shallow_clone()], 0);
                    let cut =
                        Tensor::cat(&[cut, Tensor::full([2], -1, (Kind::Int64, Device::Cpu))], 0).narrow(0, start, end - start);
                    let mut expected = (start - 2).max(0);
                    for piece in all.within(&range) {
                        let mut rectangle = tensor.view(whole.as_slice());
                        for (dimension, (&offset, &size)) in piece.offset.iter().zip(&piece.shape).enumerate() {
                            rectangle = rectangle.narrow(dimension as i64, offset - 10, size);
                        }
                        assert_eq!(piece.view(&cut), rectangle, "{range:?} of {whole:?}");
                        assert_eq!(rectangle.reshape([-1]).int64_value(&[0]), expected);
                        expected += piece.numbers();
                    }
                    assert_eq!(
                        expected,
                        (end - 2).clamp((start - 2).max(0), numbers.max((start - 2).max(0))),
                        "{range:?} of {whole:?}"
                    );
                }
            }
        }
    }
}
