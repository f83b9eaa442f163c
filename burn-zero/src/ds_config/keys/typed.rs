//! The `optimizer` and `scheduler` blocks: their types and the parameters of each type.

use super::{
    BETA_CYCLE, KeySpec, NON_NEGATIVE, ONE_STEP, POSITIVE, TypeTable, ValueKind, fixed_flag, fixed_number,
    not_honoured, read, required,
};

const CLIPPING: &str = "`gradient_clipping` decides";
const COMPRESSED: &str = "gradients are not compressed to one bit; write Adam or Lamb";
const WIDTHS: &str = "parameters carry no width multipliers; write Adam, AdamW or SGD";

const LR: KeySpec = read("lr", ValueKind::Number);
const BETAS: KeySpec = read("betas", ValueKind::Betas);
const EPS: KeySpec = read("eps", ValueKind::Number);
const WEIGHT_DECAY: KeySpec = read("weight_decay", ValueKind::Number);
const BIAS_CORRECTION: KeySpec = fixed_flag("bias_correction", true, "bias correction is always on");
const AMSGRAD: KeySpec = fixed_flag("amsgrad", false, "the second moment is always that of plain Adam");
const MAX_GRAD_NORM: KeySpec = fixed_number("max_grad_norm", 0.0, CLIPPING);
const TORCH_ADAM: KeySpec = not_honoured("torch_adam", ValueKind::Flag, ONE_STEP);

const ADAM: &[KeySpec] = &[
    LR,
    BETAS,
    EPS,
    WEIGHT_DECAY,
    read("adam_w_mode", ValueKind::Flag),
    TORCH_ADAM,
    BIAS_CORRECTION,
    AMSGRAD,
    MAX_GRAD_NORM,
    fixed_flag("fp32_optimizer_states", true, "the optimizer keeps its moments in f32"),
    not_honoured("fused", ValueKind::Flag, ONE_STEP),
];
const LAMB: &[KeySpec] = &[
    LR,
    BETAS,
    EPS,
    WEIGHT_DECAY,
    read("max_coeff", ValueKind::Number),
    read("min_coeff", ValueKind::Number),
    BIAS_CORRECTION,
    AMSGRAD,
    MAX_GRAD_NORM,
    fixed_flag("eps_inside_sqrt", false, "epsilon is added to the root"),
];
const LION: &[KeySpec] = &[LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM];
const SGD: &[KeySpec] = &[
    LR,
    read("momentum", ValueKind::Number),
    WEIGHT_DECAY,
    read("nesterov", ValueKind::Flag),
    fixed_number("dampening", 0.0, "the gradient is added to the momentum without dampening"),
    MAX_GRAD_NORM,
];

pub(super) const OPTIMIZERS: TypeTable = TypeTable {
    supported: &[("Adam", ADAM), ("AdamW", ADAM), ("Lamb", LAMB), ("Lion", LION), ("SGD", SGD)],
    unsupported: &[
        ("OneBitAdam", COMPRESSED),
        ("ZeroOneAdam", COMPRESSED),
        ("OneBitLamb", COMPRESSED),
        ("MuAdam", WIDTHS),
        ("MuAdamW", WIDTHS),
        ("MuSGD", WIDTHS),
        ("Adagrad", "only Adam, AdamW, Lamb, Lion and SGD are here; write AdamW"),
        ("Muon", "only Adam, AdamW, Lamb, Lion and SGD are here; write AdamW"),
    ],
    case_insensitive: true,
};

const LAST_BATCH: &str = "a resumed run knows its step from the checkpoint";
const WARMUP_STEPS: KeySpec = read("warmup_num_steps", POSITIVE);
const WARMUP_TYPE: KeySpec = read("warmup_type", ValueKind::Choice(&["log", "linear"]));
const WARMUP_MIN: KeySpec = read("warmup_min_lr", ValueKind::Number);
const WARMUP_MAX: KeySpec = read("warmup_max_lr", ValueKind::Number);
const TOTAL: KeySpec = required("total_num_steps", POSITIVE);
const LAST: KeySpec = not_honoured("last_batch_iteration", ValueKind::Any, LAST_BATCH);

const RANGE_TEST: &[KeySpec] = &[
    read("lr_range_test_min_lr", ValueKind::Number),
    read("lr_range_test_step_size", POSITIVE),
    read("lr_range_test_step_rate", ValueKind::Number),
    read("lr_range_test_staircase", ValueKind::Flag),
    LAST,
];
const ONE_CYCLE: &[KeySpec] = &[
    required("cycle_min_lr", ValueKind::Number),
    required("cycle_max_lr", ValueKind::Number),
    read("decay_lr_rate", ValueKind::Number),
    read("cycle_first_step_size", POSITIVE),
    read("cycle_second_step_size", POSITIVE),
    read("cycle_first_stair_count", NON_NEGATIVE),
    read("cycle_second_stair_count", NON_NEGATIVE),
    read("decay_step_size", NON_NEGATIVE),
    fixed_flag("cycle_momentum", false, BETA_CYCLE),
    not_honoured("cycle_min_mom", ValueKind::Number, BETA_CYCLE),
    not_honoured("cycle_max_mom", ValueKind::Number, BETA_CYCLE),
    not_honoured("decay_mom_rate", ValueKind::Number, BETA_CYCLE),
    LAST,
];
const WARMUP_LR: &[KeySpec] = &[WARMUP_MIN, WARMUP_MAX, WARMUP_STEPS, WARMUP_TYPE, LAST];
const WARMUP_DECAY_LR: &[KeySpec] = &[TOTAL, WARMUP_MIN, WARMUP_MAX, WARMUP_STEPS, WARMUP_TYPE, LAST];
const WARMUP_COSINE_LR: &[KeySpec] = &[
    TOTAL,
    read("warmup_min_ratio", ValueKind::Number),
    WARMUP_STEPS,
    read("cos_min_ratio", ValueKind::Number),
    WARMUP_TYPE,
    LAST,
];

pub(super) const SCHEDULERS: TypeTable = TypeTable {
    supported: &[
        ("WarmupLR", WARMUP_LR),
        ("WarmupDecayLR", WARMUP_DECAY_LR),
        ("WarmupCosineLR", WARMUP_COSINE_LR),
        ("OneCycle", ONE_CYCLE),
        ("LRRangeTest", RANGE_TEST),
    ],
    unsupported: &[],
    case_insensitive: false,
};
