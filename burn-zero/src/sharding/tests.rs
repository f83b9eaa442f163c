use super::*;

fn parameter(number: u64, elements: usize, trainable: bool, segments: &[usize]) -> Parameter {
    let (id, path, dims) = (ParamId::from(number), format!("p{number}"), vec![elements]);
    Parameter { id, path, dims, dtype: DType::F32, trainable, segments: segments.to_vec(), chunk: Some(0) }
}

/// Returns parameters of unequal sizes, tiny and large, some tied and some frozen.
fn parameters() -> Vec<Parameter> {
    let sizes = [(900, true), (1, true), (257, false), (3000, true), (256, true), (70, false), (1, true)];
    let tied: [&[usize]; 7] = [&[0, 3], &[0], &[1], &[1], &[1], &[2], &[3]];
    let each = sizes.iter().zip(tied).enumerate();
    each.map(|(i, (&(n, trainable), segments))| parameter(i as u64, n, trainable, segments)).collect()
}

fn layouts() -> impl Iterator<Item = (Sharding, usize, ShardLayout)> {
    let stages = [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights];
    let all = stages.into_iter().flat_map(|stage| (1..=5).map(move |world| (stage, world)));
    all.flat_map(|(stage, world)| [1, 1300, 1 << 20].map(|bucket_size| (Sharding { stage, bucket_size }, world))).map(
        |(sharding, world)| {
            let parameters = parameters();
            let buckets = build_buckets(&parameters, sharding, world);
            let parts = if sharding.stage >= ZeroStage::OptimizerStates { world } else { 1 };
            let layout = ShardLayout {
                parameters,
                parameter_index: HashMap::new(),
                buckets,
                num_shards: parts,
                shard_index: 0,
                num_segments: 4,
            };
            (sharding, world, layout)
        },
    )
}

#[test]
fn every_value_lies_in_exactly_one_piece() {
    for (sharding, world, layout) in layouts() {
        let mut owners: Vec<Vec<usize>> = layout.parameters.iter().map(|p| vec![0; p.elements()]).collect();
        for bucket in &layout.buckets {
            for part in 0..layout.num_shards {
                for shard in layout.param_shards(bucket, part) {
                    assert!(shard.range.start.is_multiple_of(ALIGN), "{sharding:?}, {world}: a block is torn");
                    owners[shard.parameter][shard.range].iter_mut().for_each(|n| *n += 1);
                }
            }
        }
        for (parameter, owners) in layout.parameters.iter().zip(owners) {
            let expected = usize::from(parameter.trainable || sharding.stage == ZeroStage::Weights);
            assert!(owners.iter().all(|&n| n == expected), "{sharding:?}, {world}: {}", parameter.path);
        }
    }
}

#[test]
fn parts_are_equal_and_aligned_and_padding_is_bounded() {
    for (sharding, world, layout) in layouts() {
        for bucket in &layout.buckets {
            assert!(bucket.length.is_multiple_of(ALIGN * world), "{sharding:?}, {world}");
            let filled: usize = bucket.parameters().map(|p| layout.parameters[p].elements()).sum();
            assert!(bucket.length < filled + ALIGN * (bucket.param_offsets.len() + world), "{sharding:?}, {world}");
            assert!(bucket.param_offsets.len() == 1 || filled <= sharding.bucket_size, "{sharding:?}, {world}");
        }
    }
}

#[test]
fn buckets_do_not_depend_on_the_world_and_do_not_mix() {
    for (sharding, world, layout) in layouts() {
        let one = build_buckets(&layout.parameters, sharding, 1);
        assert_eq!(one.len(), layout.buckets.len());
        for (bucket, one) in layout.buckets.iter().zip(one) {
            assert_eq!(bucket.param_offsets, one.param_offsets, "{sharding:?}, {world}");
            for p in bucket.parameters() {
                assert_eq!(layout.parameters[p].trainable, bucket.trainable);
                assert!(sharding.stage < ZeroStage::Weights || layout.parameters[p].segments == bucket.segments);
            }
        }
    }
}
