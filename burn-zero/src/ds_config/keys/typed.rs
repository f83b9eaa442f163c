//! `optimizer` and `scheduler`: their types, and each type's parameters.

use super::{COUNT, Key, Kind, POSITIVE, Types, flag, instead, need, number, read};

const FUSED: &str = "there is one implementation of the step";
const CLIPPING: &str = "`gradient_clipping` decides";
const COMPRESSED: &str = "gradients are not compressed to one bit; write Adam or Lamb";
const WIDTHS: &str = "parameters carry no width multipliers; write Adam, AdamW or SGD";

const LR: Key = read("lr", Kind::Number);
const BETAS: Key = read("betas", Kind::Betas);
const EPS: Key = read("eps", Kind::Number);
const WEIGHT_DECAY: Key = read("weight_decay", Kind::Number);
const BIAS_CORRECTION: Key = flag("bias_correction", true, "the moments are always corrected for their start");
const AMSGRAD: Key = flag("amsgrad", false, "the second moment is the plain one");
const MAX_GRAD_NORM: Key = number("max_grad_norm", 0.0, CLIPPING);
const TORCH_ADAM: Key = instead("torch_adam", Kind::Flag, FUSED);

const ADAM: &[Key] = &[
    LR,
    BETAS,
    EPS,
    WEIGHT_DECAY,
    read("adam_w_mode", Kind::Flag),
    TORCH_ADAM,
    BIAS_CORRECTION,
    AMSGRAD,
    MAX_GRAD_NORM,
    flag("fp32_optimizer_states", true, "the optimizer keeps its moments in f32"),
    instead("fused", Kind::Flag, FUSED),
];
const LAMB: &[Key] = &[
    LR,
    BETAS,
    EPS,
    WEIGHT_DECAY,
    read("max_coeff", Kind::Number),
    read("min_coeff", Kind::Number),
    BIAS_CORRECTION,
    AMSGRAD,
    MAX_GRAD_NORM,
    flag("eps_inside_sqrt", false, "epsilon is added to the root"),
];
const LION: &[Key] = &[LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM];
const SGD: &[Key] = &[
    LR,
    read("momentum", Kind::Number),
    WEIGHT_DECAY,
    read("nesterov", Kind::Flag),
    number("dampening", 0.0, "the gradient enters the momentum whole"),
    MAX_GRAD_NORM,
];

pub(super) const OPTIMIZERS: Types = Types {
    known: &[("Adam", ADAM), ("AdamW", ADAM), ("Lamb", LAMB), ("Lion", LION), ("SGD", SGD)],
    refused: &[
        ("OneBitAdam", COMPRESSED),
        ("ZeroOneAdam", COMPRESSED),
        ("OneBitLamb", COMPRESSED),
        ("MuAdam", WIDTHS),
        ("MuAdamW", WIDTHS),
        ("MuSGD", WIDTHS),
        ("Adagrad", "only Adam, AdamW, Lamb, Lion and SGD are here; write AdamW"),
        ("Muon", "only Adam, AdamW, Lamb, Lion and SGD are here; write AdamW"),
    ],
    any_case: true,
};

const BETA_CYCLE: &str = "the optimizer's betas stay as they are; only the learning rate moves";
const LAST_BATCH: &str = "a resumed run knows its step from the checkpoint";
const WARMUP_STEPS: Key = read("warmup_num_steps", POSITIVE);
const WARMUP_TYPE: Key = read("warmup_type", Kind::Choice(&["log", "linear"]));
const WARMUP_MIN: Key = read("warmup_min_lr", Kind::Number);
const WARMUP_MAX: Key = read("warmup_max_lr", Kind::Number);
const TOTAL: Key = need("total_num_steps", POSITIVE);
const LAST: Key = instead("last_batch_iteration", Kind::Any, LAST_BATCH);

const RANGE_TEST: &[Key] = &[
    read("lr_range_test_min_lr", Kind::Number),
    read("lr_range_test_step_size", POSITIVE),
    read("lr_range_test_step_rate", Kind::Number),
    read("lr_range_test_staircase", Kind::Flag),
    LAST,
];
const ONE_CYCLE: &[Key] = &[
    need("cycle_min_lr", Kind::Number),
    need("cycle_max_lr", Kind::Number),
    read("decay_lr_rate", Kind::Number),
    read("cycle_first_step_size", POSITIVE),
    read("cycle_second_step_size", POSITIVE),
    read("cycle_first_stair_count", COUNT),
    read("cycle_second_stair_count", COUNT),
    read("decay_step_size", COUNT),
    flag("cycle_momentum", false, BETA_CYCLE),
    instead("cycle_min_mom", Kind::Number, BETA_CYCLE),
    instead("cycle_max_mom", Kind::Number, BETA_CYCLE),
    instead("decay_mom_rate", Kind::Number, BETA_CYCLE),
    LAST,
];
const WARMUP_LR: &[Key] = &[WARMUP_MIN, WARMUP_MAX, WARMUP_STEPS, WARMUP_TYPE, LAST];
const WARMUP_DECAY_LR: &[Key] = &[TOTAL, WARMUP_MIN, WARMUP_MAX, WARMUP_STEPS, WARMUP_TYPE, LAST];
const WARMUP_COSINE_LR: &[Key] = &[
    TOTAL,
    read("warmup_min_ratio", Kind::Number),
    WARMUP_STEPS,
    read("cos_min_ratio", Kind::Number),
    WARMUP_TYPE,
    LAST,
];

pub(super) const SCHEDULERS: Types = Types {
    known: &[
        ("WarmupLR", WARMUP_LR),
        ("WarmupDecayLR", WARMUP_DECAY_LR),
        ("WarmupCosineLR", WARMUP_COSINE_LR),
        ("OneCycle", ONE_CYCLE),
        ("LRRangeTest", RANGE_TEST),
    ],
    refused: &[],
    any_case: false,
};
