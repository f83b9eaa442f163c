use super::*;

fn parameter(number: u64, elements: usize, trainable: bool, segments: &[usize]) -> Parameter {
    let (id, path, dims) = (ParamId::from(number), format!("p{number}"), vec![elements]);
    Parameter { id, path, dims, dtype: DType::F32, trainable, segments: segments.to_vec() }
}

/// Unequal, tiny and large, tied and frozen.
fn parameters() -> Vec<Parameter> {
    let sizes = [(900, true), (1, true), (257, false), (3000, true), (256, true), (70, false), (1, true)];
    let tied: [&[usize]; 7] = [&[0, 3], &[0], &[1], &[1], &[1], &[2], &[3]];
    let each = sizes.iter().zip(tied).enumerate();
    each.map(|(i, (&(n, trainable), segments))| parameter(i as u64, n, trainable, segments)).collect()
}

fn layouts() -> impl Iterator<Item = (Sharding, usize, Layout)> {
    let stages = [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights];
    let all = stages.into_iter().flat_map(|stage| (1..=5).map(move |world| (stage, world)));
    all.flat_map(|(stage, world)| [1, 1300, 1 << 20].map(|bucket_size| (Sharding { stage, bucket_size }, world))).map(
        |(sharding, world)| {
            let parameters = parameters();
            let buckets = buckets(&parameters, sharding, world);
            let parts = if sharding.stage >= Stage::States { world } else { 1 };
            let layout = Layout { parameters, index: HashMap::new(), buckets, parts, part: 0, segments: 4 };
            (sharding, world, layout)
        },
    )
}

#[test]
fn every_value_lies_in_exactly_one_piece() {
    for (sharding, world, layout) in layouts() {
        let mut owners: Vec<Vec<usize>> = layout.parameters.iter().map(|p| vec![0; p.elements()]).collect();
        for bucket in &layout.buckets {
            for part in 0..layout.parts {
                for piece in layout.pieces_of(bucket, part) {
                    assert!(piece.range.start.is_multiple_of(ALIGN), "{sharding:?}, {world}: a block is torn");
                    owners[piece.parameter][piece.range].iter_mut().for_each(|n| *n += 1);
                }
            }
        }
        for (parameter, owners) in layout.parameters.iter().zip(owners) {
            let expected = usize::from(parameter.trainable || sharding.stage == Stage::Weights);
            assert!(owners.iter().all(|&n| n == expected), "{sharding:?}, {world}: {}", parameter.path);
        }
    }
}

#[test]
fn parts_are_equal_and_aligned_and_padding_is_bounded() {
    for (sharding, world, layout) in layouts() {
        for bucket in &layout.buckets {
            assert!(bucket.length.is_multiple_of(ALIGN * world), "{sharding:?}, {world}");
            let filled: usize = bucket.slots.iter().map(|&(p, _)| layout.parameters[p].elements()).sum();
            assert!(bucket.length < filled + ALIGN * (bucket.slots.len() + world), "{sharding:?}, {world}");
            assert!(bucket.slots.len() == 1 || filled <= sharding.bucket_size, "{sharding:?}, {world}");
        }
    }
}

#[test]
fn buckets_do_not_depend_on_the_world_and_do_not_mix() {
    for (sharding, world, layout) in layouts() {
        let one = buckets(&layout.parameters, sharding, 1);
        assert_eq!(one.len(), layout.buckets.len());
        for (bucket, one) in layout.buckets.iter().zip(one) {
            assert_eq!(bucket.slots, one.slots, "{sharding:?}, {world}");
            for &(p, _) in &bucket.slots {
                assert_eq!(layout.parameters[p].trainable, bucket.trainable);
                assert!(sharding.stage < Stage::Weights || layout.parameters[p].segments == bucket.segments);
            }
        }
    }
}

#[test]
fn deepspeed_s_settings_are_taken_over() {
    let zero = Zero { stage: Stage::Gradients, reduce_bucket_size: 1000, ..Zero::default() };
    assert_eq!(Sharding::from(&zero), Sharding { stage: Stage::Gradients, bucket_size: 1000 });
}
