//! The sums of one tile in registers.

use super::{Arithmetic, CARRIED, ROWS, Target, WIDTH, Work, narrow, pack::transpose, tiles, vectors};
use std::{arch::x86_64::*, mem::MaybeUninit, ops::Range};

/// Words from one inner step to the next of rows that were staged side by side.
pub(super) const STAGE: usize = 16;

/// Rows of the broadcast side as words with strides: from row to row, along a row.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) words: *const u32,
    pub(super) strides: [usize; 2],
    /// From the first 16 rows to the rest, for tiles.
    pub(super) upper: usize,
    /// The first of the rows that are read next, with the same strides: they come into the cache meanwhile.
    pub(super) ahead: *const u32,
}

impl Left {
    /// Rows after which nothing is known to be read.
    pub(super) fn new(words: *const u32, strides: [usize; 2]) -> Self {
        Self { words, strides, upper: 16 * strides[0], ahead: words }
    }
}

/// A panel: [`Arithmetic::width`] words, and from one inner step to the next.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub(super) words: *const u32,
    pub(super) stride: usize,
}

/// Adds the product of a tile of rows with a panel, `inner` values deep, to the target.
///
/// # Safety
/// `left` and `right` hold these words; the machine has the instructions.
#[inline]
pub(super) unsafe fn tile(
    work: &Work,
    (left, right): (Left, Right),
    [from, to]: [usize; 2],
    (rows, column): (Range<usize>, usize),
) {
    let width = work.arithmetic.width();
    let start = column * width;
    let columns = width.min(work.vectors.count - start);
    let Target { values, strides: [down, across], add, factor } = work.target;
    // SAFETY: the tile lies in the target, by the caller.
    let out = unsafe { values.add(rows.start * down + start * across) };
    let place = Place { out, down, across, columns, add: add || from > 0, factor };
    let words = (to - from).div_ceil(work.arithmetic.pair());
    place.fetch(rows.len());
    // SAFETY: by the caller.
    unsafe {
        match work.arithmetic {
            Arithmetic::Narrow(_) => narrow::sum(rows.len(), words, (left, right), place),
            Arithmetic::F32 => sum_f32(rows.len(), words, left, right, place),
            Arithmetic::Pairs => sum_bf16(rows.len(), words, left, right, place),
            Arithmetic::Tiles => by_tiles(work, (rows.len(), words), (left, right), place),
        }
    }
}

/// A tile of the target.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) out: *mut f32,
    pub(super) down: usize,
    pub(super) across: usize,
    pub(super) columns: usize,
    pub(super) add: bool,
    pub(super) factor: f32,
}

impl Place {
    /// Asks for the memory that will be written, while it is being summed what goes there.
    fn fetch(&self, rows: usize) {
        let (lines, apart, line_parts) = match self.across {
            1 => (rows, self.down, self.columns.div_ceil(16)),
            _ => (self.columns, self.across, 1),
        };
        for line in 0..lines {
            for part in 0..line_parts {
                // SAFETY: nothing is read or written.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.out.wrapping_add(line * apart + 16 * part).cast()) };
            }
        }
    }
}

macro_rules! for_rows {
    ($sum:ident, $rows:ident, $arguments:tt) => {
        for_rows!(@ $sum, $rows, $arguments, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $sum:ident, $rows:ident, ($words:ident, $left:ident, $right:ident, $place:ident), $($n:literal)*) => {
        match $rows {
            $($n => store::<$n>($sum::<$n>($words, $left, $right), $place),)*
            _ => unreachable!("a tile has 1 to {ROWS} rows"),
        }
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn sum_f32(rows: usize, words: usize, left: Left, right: Right, place: Place) {
    // SAFETY: by the caller of [`tile`].
    unsafe {
        match left.strides {
            [_, 1] if rows == ROWS && right.stride == WIDTH => store(vectors::multiply(words, left, right), place),
            [1, ROWS] if rows == ROWS && right.stride == WIDTH => {
                store(vectors::multiply_across(words, left, right), place);
            }
            _ => for_rows!(multiply_f32, rows, (words, left, right, place)),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn sum_bf16(rows: usize, words: usize, left: Left, right: Right, place: Place) {
    // SAFETY: by the caller of [`tile`].
    unsafe { for_rows!(multiply_bf16, rows, (words, left, right, place)) }
}

/// Sums of few words go on from those before: those of a whole tile in its place, others are moved for that, so that both round
/// alike. Sums of many, or with a factor, are made apart and added.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn by_tiles(work: &Work, (rows, words): (usize, usize), sides: (Left, Right), place: Place) {
    let Place { out, down, across, columns, add, factor } = place;
    debug_assert!(across == 1);
    let mut room = Room(MaybeUninit::uninit());
    let sums = room.0.as_mut_ptr().cast::<f32>();
    let parts = [work.broadcast.parts, work.vectors.parts];
    // SAFETY: by the caller of [`tile`]; the room is a whole tile.
    unsafe {
        if factor != 1.0 || work.words() > CARRIED {
            tiles::multiply(words, sides, parts, (sums, WIDTH, false));
            move_rows([rows, columns], (sums, WIDTH), (out, down), |sum, before| {
                let sum = _mm512_mul_ps(sum, _mm512_set1_ps(factor));
                if add { _mm512_add_ps(sum, before) } else { sum }
            });
        } else if [rows, columns] == [tiles::ROWS, WIDTH] {
            tiles::multiply(words, sides, parts, (out, down, add));
        } else {
            if add {
                move_rows([rows, columns], (out, down), (sums, WIDTH), |value, _| value);
            }
            tiles::multiply(words, sides, parts, (sums, WIDTH, add));
            move_rows([rows, columns], (sums, WIDTH), (out, down), |value, _| value);
        }
    }
}

/// Room for the sums of a whole tile.
#[repr(C, align(64))]
struct Room(MaybeUninit<[f32; tiles::ROWS * WIDTH]>);

/// Writes what `of` makes of rows of at most [`WIDTH`] values and of what is there, from one stride to the other.
#[inline(always)]
unsafe fn move_rows(
    [rows, columns]: [usize; 2],
    (from, from_stride): (*const f32, usize),
    (to, to_stride): (*mut f32, usize),
    of: impl Fn(__m512, __m512) -> __m512,
) {
    for row in 0..rows {
        for start in (0..columns).step_by(16) {
            let mask = pack_mask(columns - start);
            // SAFETY: masks keep to the rows.
            unsafe {
                let to = to.add(row * to_stride + start);
                let value = _mm512_maskz_loadu_ps(mask, from.add(row * from_stride + start));
                _mm512_mask_storeu_ps(to, mask, of(value, _mm512_maskz_loadu_ps(mask, to)));
            }
        }
    }
}

pub(super) type Sums<const R: usize> = [[__m512; 2]; R];

#[inline(always)]
unsafe fn multiply_f32<const R: usize>(words: usize, left: Left, right: Right) -> Sums<R> {
    // SAFETY: by the caller of [`tile`].
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const f32, *const f32) = (left.words.cast(), right.words.cast());
        for _ in 0..words {
            let b0 = _mm512_loadu_ps(b);
            let b1 = _mm512_loadu_ps(b.add(16));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(r * left.strides[0]));
                *sum0 = _mm512_fmadd_ps(value, b0, *sum0);
                *sum1 = _mm512_fmadd_ps(value, b1, *sum1);
            }
            a = a.wrapping_add(left.strides[1]);
            b = b.wrapping_add(right.stride);
        }
        sums
    }
}

#[inline(always)]
unsafe fn multiply_bf16<const R: usize>(words: usize, left: Left, right: Right) -> Sums<R> {
    // SAFETY: by the caller of [`tile`]; the two register types have the same bits.
    unsafe {
        let pairs = |register: __m512i| -> __m512bh { std::mem::transmute(register) };
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let (mut a, mut b): (*const i32, *const i32) = (left.words.cast(), right.words.cast());
        for _ in 0..words {
            let b0 = pairs(_mm512_loadu_si512(b.cast()));
            let b1 = pairs(_mm512_loadu_si512(b.add(16).cast()));
            for (r, [sum0, sum1]) in sums.iter_mut().enumerate() {
                let value = pairs(_mm512_set1_epi32(a.add(r * left.strides[0]).read_unaligned()));
                *sum0 = _mm512_dpbf16_ps(*sum0, value, b0);
                *sum1 = _mm512_dpbf16_ps(*sum1, value, b1);
            }
            a = a.wrapping_add(left.strides[1]);
            b = b.wrapping_add(right.stride);
        }
        sums
    }
}

#[inline(always)]
unsafe fn store<const R: usize>(mut sums: Sums<R>, place: Place) {
    // SAFETY: masks keep to the tile.
    unsafe {
        if place.factor != 1.0 {
            let factor = _mm512_set1_ps(place.factor);
            for half in sums.iter_mut().flatten() {
                *half = _mm512_mul_ps(*half, factor);
            }
        }
        let put = |sum: __m512, to: *mut f32, mask: __mmask16| {
            let sum = if place.add { _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to)) } else { sum };
            _mm512_mask_storeu_ps(to, mask, sum);
        };
        let halves = place.columns.div_ceil(16);
        if place.across == 1 {
            for half in 0..halves {
                let mask = pack_mask(place.columns - 16 * half);
                for (r, sums) in sums.iter().enumerate() {
                    put(sums[half], place.out.add(r * place.down + 16 * half), mask);
                }
            }
            return;
        }
        // Rows of the tile are columns of the target, with unit stride.
        for half in 0..halves {
            let mut registers = [_mm512_setzero_si512(); 16];
            for (register, sums) in registers.iter_mut().zip(&sums) {
                *register = _mm512_castps_si512(sums[half]);
            }
            let columns = transpose(registers);
            let count = (place.columns - 16 * half).min(16);
            for (index, column) in columns.into_iter().take(count).enumerate() {
                let to = place.out.add((16 * half + index) * place.across);
                put(_mm512_castsi512_ps(column), to, pack_mask(R));
            }
        }
    }
}

/// The first `n` of 16 lanes.
#[inline(always)]
pub(super) fn pack_mask(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}
