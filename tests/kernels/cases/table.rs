//! All test cases, by kernel.

use super::{Case, CaseBuilder, Kernel, attention, numbers, packed, sight};
use crate::{blocks, host::HostAttentionMask};
use burn::tensor::DType;

/// Adds embedding cases in which rows are looked up once, several times and never.
fn embeddings(table: &mut Vec<Case>) {
    for (rows, width, n) in [(1, 1, 1), (5, 7, 4), (300, 33, 65)] {
        let ids = (0..n).map(|i| (i * i + 3 * i) % rows).collect();
        let row = CaseBuilder::new(format!("embedding {n} of {rows} × {width}")).input(&[rows as usize, width], 1.0);
        table.push(row.case(Kernel::Embed { ids }));
    }
}

fn rms_norms(table: &mut Vec<Case>) {
    let kernel = Kernel::RmsNorm { epsilon: 1e-5 };
    for (n, width) in [(1, 1), (1, 7), (7, 16), (63, 33), (193, 20), (65, 576)] {
        let row = CaseBuilder::new(format!("rms_norm {n} × {width}")).input(&[n, width], 1.0).input(&[width], 1.5);
        table.push(row.case(kernel.clone()));
    }
    // Rows so small that epsilon dominates, and a row of zeros.
    let mut small = CaseBuilder::new("rms_norm of next to nothing").input(&[4, 6], 3e-3).input(&[6], 1.0);
    small.inputs[0].values[6..12].fill(0.0);
    table.push(small.case(kernel.clone()));
    table
        .push(CaseBuilder::new("rms_norm, weight frozen").input(&[7, 20], 1.0).frozen(&[20], 1.0).case(kernel.clone()));
    for dtype in [DType::BF16, DType::F16] {
        let row = CaseBuilder::new(format!("rms_norm, weight {dtype:?}")).input(&[7, 20], 1.0);
        table.push(row.stored(&[20], 1.0, dtype, false).case(kernel.clone()));
    }
}

fn elementwise(table: &mut Vec<Case>) {
    for (n, heads, dim) in [(1, 1, 2), (7, 3, 10), (65, 2, 64), (600, 1, 6)] {
        let row = CaseBuilder::new(format!("rope {n} × {heads} × {dim}")).input(&[n, heads, dim], 1.0);
        let angles = numbers(&row.name, n * dim / 2, 600.0);
        let exact = |x: f64| x as f32 as f64;
        let cos = angles.iter().map(|angle| exact(angle.cos())).collect();
        table.push(row.case(Kernel::Rope { cos, sin: angles.iter().map(|angle| exact(angle.sin())).collect() }));
    }
    for (n, width) in [(1, 1), (7, 9), (63, 65), (193, 100)] {
        let mut row = CaseBuilder::new(format!("swiglu {n} × {width}")).input(&[n, width], 6.0).input(&[n, width], 1.0);
        // Values at which the logistic function saturates, or its exponential exceeds the range of f32.
        for (value, extreme) in row.inputs[0].values.iter_mut().zip([0.0, -20.0, 20.0, -100.0, 100.0]) {
            *value = extreme;
        }
        table.push(row.case(Kernel::SwiGlu));
    }
}

fn linears(table: &mut Vec<Case>) {
    for (n, features, out) in [(1, 1, 1), (7, 20, 33), (65, 64, 100), (600, 7, 1), (193, 130, 257)] {
        let row = CaseBuilder::new(format!("linear {n} × {features} → {out}"));
        table.push(row.input(&[n, features], 1.0).input(&[out, features], 1.0).case(Kernel::Linear));
    }
    for n in [1, 3, 8] {
        let row = CaseBuilder::new(format!("linear, few rows: {n}")).input(&[n, 197], 1.0);
        table.push(row.input(&[33, 197], 1.0).case(Kernel::Linear));
    }
    for dtype in [DType::BF16, DType::F16] {
        for [n, features] in [[65, 20], [1, 198], [3, 131], [8, 64]] {
            let row = CaseBuilder::new(format!("linear {n} × {features}, weight {dtype:?}")).input(&[n, features], 1.0);
            table.push(row.stored(&[33, features], 1.0, dtype, false).case(Kernel::Linear));
        }
    }
    for [n, features] in [[1, 3], [65, 20], [130, 97]] {
        let row =
            CaseBuilder::new(format!("joined {n} × {features}")).input(&[n, features], 1.0).input(&[features], 1.0);
        let row = row.input(&[features, features], 1.0).input(&[features, features], 1.0);
        table.push(row.case(Kernel::Joined { epsilon: 1e-5 }));
    }
}

fn attentions(table: &mut Vec<Case>) {
    let causal = |n: i32| packed(&[n]);
    for (n, heads) in [
        (1, [1, 1, 2]),
        (7, [2, 2, 6]),
        (63, [3, 1, 20]),
        (64, [8, 1, 16]),
        (65, [8, 1, 6]),
        (193, [6, 2, 10]),
        (600, [3, 1, 20]),
    ] {
        table.push(attention(&format!("of {n}"), causal(n), heads));
    }
    table.push(attention("of 7, group of 200", causal(7), [200, 1, 2]));
    table.push(attention("packed", packed(&[1, 7, 63, 64, 65]), [3, 3, 6]));
    let padded = sight(&[(&[], &[(1, 0, 70)]), (&[], &[(1, 0, 9), (2, 0, 30), (0, 0, 31)])], None);
    table.push(attention("of packed and padded rows", padded, [4, 2, 6]));
    for window in [1, 5, 64] {
        let sight = HostAttentionMask { window: Some(window), ..causal(193) };
        table.push(attention(&format!("in a window of {window}"), sight, [3, 1, 10]));
    }
    let hole = |n| (HostAttentionMask::EMPTY_SEGMENT, 0, n);
    let past = [
        (&[(HostAttentionMask::ANY_SEGMENT, 0, 3), (1, 3, 5), hole(4)][..], &[(1, 8, 7)][..]),
        (&[(HostAttentionMask::ANY_SEGMENT, 0, 3), (1, 3, 9)][..], &[(1, 12, 4), (0, 0, 3)][..]),
        (&[(HostAttentionMask::ANY_SEGMENT, 0, 3), hole(2), (1, 3, 7)][..], &[(1, 10, 7)][..]),
    ];
    table.push(attention("after a prefix and a past with holes", sight(&past, None), [8, 1, 6]));
    table.push(attention("after a prefix and a past, in a window", sight(&past, Some(4)), [3, 1, 6]));
    let decode = [(&[(1, 0, 590), hole(9)][..], &[(1, 590, 1)][..]), (&[(1, 0, 599)][..], &[(1, 599, 1)][..])];
    table.push(attention("of one new token each", sight(&decode, None), [6, 2, 10]));
    let segments = [(&[(HostAttentionMask::ANY_SEGMENT, 0, 5)][..], &[(1, 5, 30), (2, 5, 66), (3, 5, 1)][..])];
    table.push(attention("packed after a prefix", sight(&segments, None), [3, 1, 6]));
    let mut blind = sight(&[(&[], &[(1, 0, 66)]), (&[], &[(1, 0, 66)])], None);
    // Queries 3 and 65 of the first row and all queries of the second see no key.
    (blind.query_segments[3], blind.query_segments[65]) = (9, 9);
    blind.query_segments[66..].fill(9);
    table.push(attention("with queries that see nothing", blind, [3, 1, 6]));
}

fn cross_entropies(table: &mut Vec<Case>) {
    let kernel = |name: &str, n: usize, vocabulary: usize| {
        let ids = numbers(&format!("{name}.ids"), n, 0.5).into_iter().map(|x| ((x + 0.5) * vocabulary as f64) as i32);
        let mut weights = numbers(&format!("{name}.weights"), n, 1.0);
        weights[n / 2] = if n > 1 { 0.0 } else { 1.0 };
        Kernel::CrossEntropy { ids: ids.map(|id| id.clamp(0, vocabulary as i32 - 1)).collect(), weights }
    };
    let row = |name: &str, n: usize, features: usize| {
        CaseBuilder::new(format!("cross-entropy {name}")).input(&[n, features], 1.0)
    };
    for (n, features, vocabulary) in
        [(1, 7, 1), (7, 20, 17), (63, 6, 300), (65, 3, 70_001), (600, 10, 4999), (4100, 3, 11)]
    {
        let name = format!("{n} × {features} → {vocabulary}");
        let case = row(&name, n, features).input(&[vocabulary, features], 1.0).case(kernel(&name, n, vocabulary));
        // Every other case has the same gradient for all losses, for which a backend may have a special path.
        let dy = if n % 2 == 1 { case.dy.clone() } else { vec![0.375; n] };
        table.push(Case { dy, ..case });
    }
    let frozen = row("frozen head", 64, 10).frozen(&[33, 10], 1.0).case(kernel("frozen", 64, 33));
    table.push(Case { name: format!("{} in proportion", frozen.name), dy: vec![-2.5; 64], ..frozen.clone() });
    table.push(frozen);
    let trained = CaseBuilder::new("cross-entropy head alone").frozen(&[64, 10], 1.0).input(&[33, 10], 1.0);
    table.push(trained.case(kernel("head", 64, 33)));
    for dtype in [DType::BF16, DType::F16] {
        let name = format!("head {dtype:?}");
        let row = row(&name, 65, 6).stored(&[4999, 6], 1.0, dtype, false);
        table.push(row.case(kernel(&name, 65, 4999)));
    }
}

/// Returns all test cases.
pub fn table() -> Vec<Case> {
    let mut table = Vec::new();
    embeddings(&mut table);
    rms_norms(&mut table);
    elementwise(&mut table);
    linears(&mut table);
    blocks::products(&mut table);
    attentions(&mut table);
    cross_entropies(&mut table);
    table
}
