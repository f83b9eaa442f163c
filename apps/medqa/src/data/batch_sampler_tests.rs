use super::*;
use std::path::Path;

/// Returns a recipe with the overrides `sets` and two sources, the second with weight 1.5.
fn recipe(sets: &[&str]) -> Recipe {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    let text = "[model]\npath = 'm'\n[data]\nmax_length = 30\ntrain = ['a', { path = 'b', weight = 1.5 }]\n";
    Recipe::parse(text, Path::new("r.toml"), &sets).unwrap()
}

fn lengths() -> Vec<Vec<usize>> {
    let length = |row: usize| 2 + row * row * 7 % 29;
    vec![(0..41).map(length).collect(), (41..61).map(length).collect()]
}

fn plan(world: usize, sets: &[&str]) -> BatchSampler {
    BatchSampler::new(&recipe(sets), lengths(), world).unwrap()
}

fn all(mut plan: BatchSampler) -> Vec<GlobalBatch> {
    (0..plan.total_steps()).map(|step| plan.step(step)).collect()
}

/// Returns the rows of every non-empty micro-batch, by step.
fn learned(steps: &[GlobalBatch]) -> Vec<Vec<Vec<RowIndex>>> {
    let rows = |step: &GlobalBatch| {
        let batches = step.micro_batches.iter().filter(|rows| !rows.is_empty());
        batches.map(|rows| step.rows[rows.clone()].to_vec()).collect()
    };
    steps.iter().map(rows).collect()
}

const WAYS: [&[&str]; 4] = [
    &[],
    &["data.packing=fill"],
    &["data.packing=false", "data.group_by_length=true"],
    &["data.packing=fill", "data.group_by_length=true"],
];

#[test]
fn an_epoch_is_shown_in_its_order_each_row_once_and_all_ranks_have_as_many_micro_batches() {
    for way in WAYS {
        for world in 1..5 {
            for batch_size in 1..5 {
                let batch = format!("train.batch_size={batch_size}");
                let plan = plan(world, &[way, &[&batch, "train.gradient_accumulation=2", "train.epochs=3"]].concat());
                let orders: Vec<_> = (0..3).flat_map(|epoch| plan.build_epoch(epoch, 0).order).collect();
                let mut seen = Vec::new();
                for step in all(plan) {
                    let ranks = (0..world).map(|rank| step.micro_batches_of_rank(rank, world).collect::<Vec<_>>());
                    let ranks: Vec<_> = ranks.collect();
                    assert!(ranks.iter().all(|own| own.len() == ranks[0].len() && own.len() <= 2));
                    let rounds = (0..ranks[0].len()).flat_map(|round| ranks.iter().map(move |own| &own[round]));
                    let rows: Vec<_> = rounds.flat_map(|rows| &step.rows[rows.clone()]).copied().collect();
                    assert_eq!(rows, step.rows);
                    seen.extend(rows);
                }
                assert_eq!(seen, orders, "{way:?}, {world} ranks, batches of {batch_size}");
                let mut rows = seen[..71].to_vec();
                rows.sort_unstable();
                rows.dedup();
                assert_eq!(rows.len(), 61);
            }
        }
    }
}

#[test]
fn a_step_has_its_rows_unless_it_is_to_be_filled() {
    for (world, accumulation, batch_size) in [(1, 1, 4), (3, 2, 5), (2, 3, 1), (4, 1, 50)] {
        let sets = [format!("train.gradient_accumulation={accumulation}"), format!("train.batch_size={batch_size}")];
        let plan = plan(world, &[&sets[0], &sets[1], "train.epochs=2"]);
        let (order, rows) = (plan.build_epoch(0, 0).order, world * accumulation * batch_size);
        let (steps, first) = (all(plan), order.chunks(rows));
        assert_eq!(steps.len(), 2 * first.len());
        for (step, rows) in steps.iter().zip(first) {
            assert_eq!(step.rows, rows);
            // Each round over all ranks is cut evenly.
            for (round, rows) in step.micro_batches.chunks(world).zip(rows.chunks(batch_size * world)) {
                let each = rows.len().div_ceil(world);
                assert!(round.iter().all(|rows| rows.len() <= each));
                assert_eq!(round.iter().map(Range::len).max(), Some(each));
            }
        }
    }
}

#[test]
fn a_filled_micro_batch_keeps_its_budget_and_has_no_room_for_the_next_row() {
    let plan = plan(1, &["data.packing=fill", "train.batch_size=3", "train.gradient_accumulation=4"]);
    let (budget, most) = (plan.token_budget(), plan.max_micro_batch_tokens());
    assert_eq!((budget, most), (90, 90));
    let lengths = lengths();
    let steps = learned(&all(plan));
    let (last, others) = steps.split_last().unwrap();
    assert!(others.iter().all(|step| step.len() == 4) && last.len() <= 4);
    let batches: Vec<_> = steps.concat();
    let tokens = |rows: &[RowIndex]| rows.iter().map(|index| lengths[index.source][index.row]).sum::<usize>();
    assert!(batches.iter().all(|rows| tokens(rows) <= budget));
    assert!(batches.windows(2).all(|pair| tokens(&pair[0]) + tokens(&pair[1][..1]) > budget));
    // A row longer than the budget is not left out, and a budget for a whole epoch makes it one step.
    let plan = self::plan(1, &["data.packing=fill", "train.batch_size=1", "data.max_length=2"]);
    assert!(learned(&all(plan)).concat().iter().all(|rows| rows.len() == 1 || tokens(rows) <= 2));
    let plan = self::plan(1, &["data.packing=fill", "train.batch_size=9999"]);
    assert_eq!((plan.total_steps(), plan.max_micro_batch_tokens()), (1, tokens(&plan.current_epoch.order)));
}

#[test]
fn as_many_micro_batches_per_step_are_the_same_steps_in_any_world() {
    for grouped in ["false", "true"] {
        let steps = |world: usize| {
            let sets =
                [format!("train.gradient_accumulation={}", 6 / world), format!("data.group_by_length={grouped}")];
            let steps =
                all(plan(world, &["data.packing=fill", "train.batch_size=2", &sets[0], &sets[1], "train.epochs=2.5"]));
            (learned(&steps), steps.into_iter().map(|step| (step.rows, step.epoch)).collect::<Vec<_>>())
        };
        for world in [2, 3, 6] {
            assert_eq!(steps(world), steps(1), "{world} ranks");
        }
    }
}

#[test]
fn a_plan_begins_anywhere() {
    for way in WAYS {
        let sets = [way, &["train.batch_size=2", "train.gradient_accumulation=2", "train.max_steps=60"]].concat();
        for (step, expected) in all(plan(1, &sets)).into_iter().enumerate() {
            assert_eq!(plan(1, &sets).step(step), expected, "{way:?}, step {step}");
        }
    }
}

#[test]
fn epochs_are_counted_in_the_steps_that_they_have() {
    for epochs in ["0.3", "1", "1.1", "1.5", "3", "7.9"] {
        let set = format!("train.epochs={epochs}");
        let plan = plan(1, &["data.packing=fill", "train.batch_size=1", "data.max_length=31", &set]);
        let epochs: f64 = epochs.parse().unwrap();
        let each: Vec<usize> = (0..8).map(|index| plan.steps_in(&plan.build_epoch(index, 0))).collect();
        assert!(each.iter().any(|&steps| steps != each[0]), "the test needs epochs that differ: {each:?}");
        let steps = all(plan);
        // It is the smallest number of steps that passes over the data this often.
        assert!(
            steps.last().unwrap().epoch >= epochs && steps[..steps.len() - 1].iter().all(|step| step.epoch < epochs)
        );
        let mut end = 0;
        for (index, count) in each.into_iter().enumerate().take(epochs as usize) {
            end += count;
            assert_eq!(steps[end - 1].epoch, (index + 1) as f64);
        }
        assert!(steps.windows(2).all(|pair| pair[0].epoch < pair[1].epoch));
    }
    assert_eq!(plan(1, &["train.epochs=1.5"]).total_steps(), 27, "18 steps of 4 of 71 rows");
    assert_eq!(plan(1, &["train.epochs=1.5"]).max_micro_batch_tokens(), 4 * 30, "the four longest");
    assert_eq!(plan(1, &["data.packing=fill", "train.max_steps=1000"]).total_steps(), 1000);
    let empty = BatchSampler::new(&recipe(&["data.train=[{path = 'a', weight = 0.01}]"]), vec![vec![5; 9]], 1);
    assert!(empty.unwrap_err().to_string().contains("`data.train`: expected weights"));
}
