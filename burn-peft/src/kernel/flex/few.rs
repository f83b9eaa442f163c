//! Products of few rows of activations, of one mostly, with weights as they are stored: every row of a weight is read once. By
//! integers or vectors where the machine has them for that storage. Nothing is allocated once a thread has done it before.

#[cfg(target_arch = "x86_64")]
use super::integers::{Integers, Narrow};
pub use super::rows::Rows;
use super::{
    dots::Dots,
    rows::{Bytes, CHUNK, Kind},
};
#[cfg(target_arch = "x86_64")]
use crate::packed::Codec;
use crate::{
    kernel::scratch::{vectorized, with_scratch},
    packed::{RowCodec, RowUser},
};
use rayon::prelude::*;

/// Products with fewer values are not worth other threads.
const SERIAL: usize = 1 << 17;

/// `y = x·Wᵀ`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `W [out, in]`.
    pub weight: &'a Rows,
    /// `[tokens, in]`.
    pub x: &'a [f32],
    /// `[tokens, out]`.
    pub y: &'a mut [f32],
}

impl Product<'_> {
    fn tokens(&self) -> usize {
        self.x.len() / self.weight.features.max(1)
    }
}

/// Several products at once: all are divided among the threads together.
///
/// # Panics
/// If what is multiplied or written has another size than the weight asks for.
pub fn products<const N: usize>(products: [Product<'_>; N]) {
    for Product { weight, x, y } in &products {
        let tokens = x.len() / weight.features.max(1);
        assert_eq!(
            [x.len(), y.len()],
            [tokens * weight.features, tokens * weight.out],
            "a product with {:?}",
            weight.shape()
        );
    }
    if products.iter().all(|product| product.tokens() <= 1) {
        return across(products);
    }
    let room = products.iter().map(|product| product.y.len()).sum();
    with_scratch(room, |room| {
        let mut rest = &mut *room;
        across(products.each_ref().map(|Product { weight, x, y }| {
            let (y, after) = std::mem::take(&mut rest).split_at_mut(y.len());
            rest = after;
            Product { weight, x, y }
        }));
        let mut from = 0;
        for product in products {
            let tokens = product.tokens();
            let Product { weight, y, .. } = product;
            for (row, columns) in room[from..from + y.len()].chunks_exact(tokens.max(1)).enumerate() {
                columns.iter().enumerate().for_each(|(token, &value)| y[token * weight.out + row] = value);
            }
            from += y.len();
        }
    });
}

/// A product whose activations are in the form in which its weight meets them.
struct Work<'a> {
    weight: &'a Rows,
    inputs: Inputs<'a>,
    /// Where `[out, tokens]` goes.
    y: *mut f32,
    tokens: usize,
    /// Rows of a part, and the number of parts.
    step: usize,
    parts: usize,
}

// SAFETY: every part writes values of its own.
unsafe impl Sync for Work<'_> {}

/// `W·xᵀ [out, tokens]`.
fn across<const N: usize>(products: [Product<'_>; N]) {
    let work = products.map(|product| {
        let tokens = product.tokens();
        let Product { weight, x, y } = product;
        let step = (CHUNK / weight.features.max(1)).max(1);
        let parts = if y.is_empty() { 0 } else { weight.out.div_ceil(step) };
        Work { weight, inputs: Inputs::of(weight, x), y: y.as_mut_ptr(), tokens, step, parts }
    });
    let one = |mut index: usize| {
        for work in &work {
            if index < work.parts {
                return work.part(index);
            }
            index -= work.parts;
        }
    };
    let parts = work.iter().map(|work| work.parts).sum::<usize>();
    if work.iter().map(|work| work.weight.out * work.weight.features * work.tokens).sum::<usize>() < SERIAL {
        (0..parts).for_each(one);
    } else {
        (0..parts).into_par_iter().for_each(one);
    }
}

impl Work<'_> {
    fn part(&self, index: usize) {
        let first = index * self.step;
        let rows = self.step.min(self.weight.out - first);
        // SAFETY: the part lies in `y`, which is `[out, tokens]`, and no other has a row of it.
        let y = unsafe { std::slice::from_raw_parts_mut(self.y.add(first * self.tokens), rows * self.tokens) };
        let rows = self.weight.from(first);
        match &self.inputs {
            #[cfg(target_arch = "x86_64")]
            Inputs::Integers(x) => x.multiply(rows, y),
            #[cfg(target_arch = "x86_64")]
            Inputs::Words(x) => x.multiply(rows, y),
            Inputs::Floats(x) => x.multiply(rows, y),
            Inputs::Plain(x) => self.weight.kind.rows(Multiply { rows, x, y }),
        }
    }
}

/// Activations as a weight meets them.
enum Inputs<'a> {
    #[cfg(target_arch = "x86_64")]
    Integers(Integers),
    #[cfg(target_arch = "x86_64")]
    Words(Narrow),
    Floats(Dots<'a>),
    Plain(&'a [f32]),
}

impl<'a> Inputs<'a> {
    fn of(weight: &Rows, x: &'a [f32]) -> Self {
        match weight.kind {
            _ if x.is_empty() || weight.out == 0 => Self::Plain(x),
            #[cfg(target_arch = "x86_64")]
            Kind::Packed(Codec::Blocks(kind)) => {
                let bytes = Integers::new(kind, x, weight.features).map(Self::Integers);
                let words = || Narrow::new(kind, x, weight.features).map(Self::Words);
                bytes.or_else(words).unwrap_or(Self::Plain(x))
            }
            Kind::Packed(_) => Self::Plain(x),
            Kind::Floats(dtype) => Dots::new(dtype, x, &weight.from(0)).map_or(Self::Plain(x), Self::Floats),
        }
    }
}

/// The products of rows with every row of `x`, until `y` is full.
struct Multiply<'a> {
    rows: Bytes<'a>,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl RowUser for Multiply<'_> {
    type Output = ();

    fn with<R: RowCodec>(self) {
        let Self { rows, x, y } = self;
        let tokens = x.len() / rows.features;
        vectorized(
            #[inline(always)]
            || {
                for (index, y) in y.iter_mut().enumerate() {
                    let (row, token) = (index / tokens, index % tokens);
                    *y = R::dot(rows.row(row), &x[token * rows.features..][..rows.features]);
                }
            },
        )
    }
}
