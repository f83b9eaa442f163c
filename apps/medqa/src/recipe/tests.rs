use super::value::Warmup;
use super::*;
use crate::schema::Format;
use clap::ValueEnum;

const LEAST: &str = "[model]\npath = \"m.gguf\"\n[data]\ntrain = \"t.jsonl\"\n";

fn parse(text: &str, sets: &[&str]) -> Result<Recipe> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Recipe::parse(text, Path::new("r.toml"), &sets)
}

fn refusal(text: &str, sets: &[&str]) -> String {
    let error = format!("{:#}", parse(text, sets).expect_err(&format!("{text} {sets:?}")));
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

#[test]
fn the_least_recipe_has_every_default() {
    let recipe = parse(LEAST, &[]).unwrap();
    assert_eq!(recipe.train.optimizer.learning_rate, Some(2e-4));
    assert_eq!(recipe.train.steps.epochs, Some(1.0));
    assert_eq!(recipe.train.schedule.warmup, Some(Warmup::Steps(0)));
    assert_eq!((recipe.data.packing, recipe.data.group_by_length), (Packing::PaddingFree, false));
    assert_eq!(recipe.data.train[0].path, "t.jsonl");
    assert_eq!(recipe.method.targets.target_modules, Some(TargetModules::default()));
    let full = parse(LEAST, &["method.kind=full", "train.max_steps=3"]).unwrap();
    assert_eq!(full.train.optimizer.learning_rate, Some(2e-5));
    assert_eq!((full.train.steps.epochs, full.train.steps.max_steps), (None, Some(3)));
}

#[test]
fn a_written_recipe_loads_as_itself() {
    let rich = "[model]\npath = 'a/b'\ndtype = 'bf16'\n[data]\ntrain = ['x', { path = 'y', format = 'pubmedqa', weight = 2 }]\nvalid = 'v'\nvalid_limit = 7\n[method]\ntarget_modules = 'all-linear'\nalpha = 32\ninit = 'adapter'\n[train]\nmax_steps = 9\nscheduler = 'WarmupDecayLR'\nwarmup = 3\nbetas = [0.9, 0.95]\nactivation_checkpointing = 2\neval_every = 4\nsave_every = 5\n";
    let named = [
        "data.train=[{path = 'x', format = 'messages', columns = {role = 'who'}, weight = 0.5}]",
        "data.columns={answer = 'reply'}",
        "method.kind=freeze",
        "method.layers={count = -1, extra_modules = ['norm']}",
    ];
    for (text, sets) in [
        (LEAST, &[][..]),
        (rich, &[]),
        (LEAST, &["train.activation_checkpointing=full", "train.warmup=0"]),
        (LEAST, &["method.kind=freeze"]),
        (LEAST, &["data.packing=false"]),
        (LEAST, &["data.packing=fill", "data.group_by_length=true"]),
        (LEAST, &named),
    ] {
        let recipe = parse(text, sets).unwrap();
        let written = recipe.to_toml().unwrap();
        assert_eq!(parse(&written, &[]).expect(&written), recipe, "{written}");
    }
    let recipe = parse(rich, &[]).unwrap();
    assert_eq!(recipe.data.train[1].weight, 2.0);
    assert_eq!(recipe.train.steps.activation_checkpointing, burn_zero::segment::Checkpointing::Every(2));
    assert_eq!(recipe.train.schedule.warmup, Some(Warmup::Steps(3)));
}

#[test]
fn sets_override_and_fall_back_to_strings() {
    let recipe = parse(
        LEAST,
        &[
            "train.batch_size=8",
            "data.train=a b.jsonl",
            "data.valid=\"v\"",
            "method.target_modules=[\"o_proj\"]",
            "method.dropout = 0.1",
        ],
    )
    .unwrap();
    assert_eq!(recipe.train.steps.batch_size, 8);
    assert_eq!(recipe.data.train[0].path, "a b.jsonl");
    assert_eq!(recipe.data.valid, Some(ValidationRows::Path("v".to_owned())));
    assert_eq!(recipe.method.targets.target_modules, Some(TargetModules::Names(vec!["o_proj".into()])));
    assert_eq!(parse("", &["model.path=m", "data.train=t"]).unwrap().model.path, "m");
    // A value that would open a line of its own stays one string.
    assert_eq!(parse(LEAST, &["model.path=1\nx = 2"]).unwrap().model.path, "1\nx = 2");
}

#[test]
fn unknown_keys_name_their_nearest() {
    for (table, near) in [
        ("[train]\nbatchsize = 1", "`train.batchsize`: unknown key; the nearest known key is `train.batch_size`"),
        ("[train]\nmax_length = 1", "`data.max_length`"),
        ("[method]\nlora_alpha = 1", "`method.alpha`"),
        ("[method]\nrank = 1", "r.toml: `method.rank`"),
        ("[trian]\nseed = 1", "nearest known key is `train`"),
        ("[train]\nLearning_Rate = 1", "`train.learning_rate`"),
    ] {
        let error = refusal(table, &[]);
        assert!(error.starts_with("r.toml: ") && error.contains(near), "{error}");
    }
    let error = refusal(LEAST, &["train.lr_scheduler=cosine"]);
    assert!(error.starts_with("--set: `train.lr_scheduler`") && error.contains("`train.scheduler`"), "{error}");
    assert!(refusal(LEAST, &["seed=1"]).contains("expected table.key"));
    assert!(refusal(LEAST, &["seed"]).contains("table.key=value"));
    assert!(refusal("model = 3", &["model.path=x"]).contains("found integer"));
    assert!(refusal(LEAST, &["data.train=[{path = 'x', wieght = 2}]"]).contains("wieght"));
}

#[test]
fn keys_of_other_tools_lead_to_ours_or_to_what_there_is_instead() {
    for (path, words) in [
        ("data.cutoff_len", "is called `data.max_length` here"),
        ("train.cutoff_len", "is called `data.max_length` here"),
        ("data.max-seq-length", "is called `data.max_length` here"),
        ("data.val_size", "is called `data.valid` here (a share of the training rows, such as 0.05, or a path)"),
        ("train.load_best_model_at_end", "is called `train.keep_best` here (\"valid_loss\")"),
        ("train.neftune_noise_alpha", "is not here"),
        ("train.num_train_epochs", "`train.epochs`"),
        ("method.lora_rank", "`method.r`"),
        ("lora_parameters.rank", "`method.r`"),
        ("train.warmup_ratio", "`train.warmup` here (a number with a point"),
        ("deepspeed", "stands in the table [parallel]: `parallel.deepspeed`"),
        ("train.deepspeed", "`parallel.deepspeed`"),
        ("train.packing", "`data.packing`"),
        ("train.flash_attn", "is not here: the device chooses the kernels"),
        // Neither known nor near: no key is suggested.
        ("train.colour", "those of [train] are batch_size, "),
        ("colour", "a recipe has the tables [model], [data], "),
        ("data.value", "those of [data] are "),
    ] {
        let message = keys::RecipeKeys::new().unknown_key_message(path);
        assert!(message.starts_with("unknown key; ") && message.contains(words), "{path}: {message}");
    }
    let known = keys::RecipeKeys::new();
    let known: Vec<String> =
        known.tables().iter().flat_map(|table| table.keys.iter().map(|key| format!("{}.{key}", table.name))).collect();
    for key in other_tools::named_keys() {
        assert!(known.iter().any(|known| known == key), "{key} is a key");
    }
    for key in &known {
        let last = key.rsplit('.').next().unwrap();
        assert!(other_tools::answer(last).is_none(), "{key} is a key here, so it is no name of others alone");
    }
}

#[test]
fn files_of_other_tools_are_recognized_with_their_first_keys() {
    for (text, words) in [
        (
            "model_name_or_path: x\nstage: sft\n",
            ["of LLaMA-Factory", "`model_name_or_path` is called `model.path` here"],
        ),
        ("base_model: x\nsequence_len: 512\n", ["of axolotl", "`sequence_len` is called `data.max_length` here"]),
        ("model: x\niters: 5\nlora_parameters: {rank: 4}\n", ["of mlx-lm", "`iters` is called `train.max_steps` here"]),
        ("{\"train_micro_batch_size_per_gpu\": 1}", ["of DeepSpeed", "--deepspeed FILE"]),
        ("distributed_type: FSDP\n", ["of Accelerate", "--accelerate FILE"]),
        ("{\"peft_type\": \"LORA\", \"r\": 8}", ["of PEFT", "method.init"]),
        ("{\"per_device_train_batch_size\": 2}", ["of transformers", "`train.batch_size`"]),
        ("colour: red\n", ["YAML or JSON", "a recipe is TOML"]),
    ] {
        let error = parse(text, &[]).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        assert!(error.starts_with("r.toml: this looks like ") && !error.contains('\n'), "{error}");
    }
    // A recipe with a mistake stays TOML.
    assert!(parse("[model]\npath: x\n", &[]).unwrap_err().to_string().contains("r.toml:2: not valid TOML"));
}

#[test]
fn wrong_types_name_key_expected_and_found() {
    for (set, parts) in [
        ("train.batch_size=many", "`train.batch_size`: expected a whole number, 0 or more, found string \"many\""),
        ("train.batch_size=-1", "expected a whole number, 0 or more, found integer `-1`"),
        ("train.batch_size=1.5", "found floating point `1.5`"),
        ("train.learning_rate=fast", "`train.learning_rate`: expected a number, found string \"fast\""),
        ("train.betas=[0.9]", "`train.betas`: expected a list of 2 numbers"),
        ("train.betas=[0.9, 0.9, 0.9]", "a list of 2 numbers, found length 3"),
        ("train.warmup=1.5", "`train.warmup`: expected steps as an integer"),
        ("train.warmup=-1", "found integer `-1`"),
        ("train.activation_checkpointing=half", "`train.activation_checkpointing`: expected \"none\", \"full\""),
        ("train.activation_checkpointing=0", "found integer `0`"),
        ("train.scheduler=step", "`train.scheduler`: expected one of `constant`, `constant_with_warmup`, `linear`"),
        ("data.shuffle=1", "expected true or false, found integer `1`"),
        ("data.group_by_length=1", "expected true or false, found integer `1`"),
        ("data.packing=full", "`data.packing`: expected true, false or \"fill\", found string \"full\""),
        ("data.packing=1", "`data.packing`: expected true, false or \"fill\", found integer `1`"),
        ("data.train=3", "`data.train`: expected a path, or a list"),
        ("data.train={path = 'x'}", "a path, or a list of { path, format, columns, weight }, found a table"),
        ("data.train=[3]", "item 1: expected a path, or { path, format, columns, weight }, found integer `3`"),
        ("data.train=[{path = 3}]", "item 1: `path`: expected a string, found integer `3`"),
        (
            "data.train=['x', {path = 'y', format = 3}]",
            "item 2: `format`: expected a string, found another kind of value",
        ),
        ("data.train=[{weight = 3}]", "item 1: missing field `path`"),
        (
            "data.format=csv",
            "`data.format`: expected one of `qa`, `pubmedqa`, `alpaca`, `messages`, `sharegpt`, `prompt-completion`, `multiple-choice`, `text`, found `csv`",
        ),
        ("data.columns=prompt", "`data.columns`: expected a table, found string \"prompt\""),
        ("data.columns={question = 1}", "`data.columns`: expected a string, found integer `1`"),
        ("data.train=[{path = 'x', columns = 3}]", "item 1: `columns`: expected a table, found integer `3`"),
        (
            "method.layers=half",
            "`method.layers`: expected a number of blocks, or { count, extra_modules }, found string",
        ),
        ("method.layers={last = 2}", "`method.layers`: unknown field `last`, expected `count` or `extra_modules`"),
        ("method.target_modules=[1]", "`method.target_modules`: expected a string, found integer `1`"),
        ("method.target_modules=1", "expected a list of module names, or one string"),
        ("model.dtype=int8", "`nf4`, found `int8`"),
        ("model.dtype={}", "`model.dtype`: expected a string, found a table"),
        ("method.kind=3", "`method.kind`: expected a string, found integer `3`"),
        ("method.modules_to_save=norm", "`method.modules_to_save`: expected a list, found string \"norm\""),
        (
            "method.layers_to_transform=last",
            "expected a block's index, 0 or more, or a list of indices, found string \"last\"",
        ),
        ("method.layers_pattern=[1]", "`method.layers_pattern`: expected a name, or a list of names, found a list"),
        ("model.path=7", "expected a string, found integer `7`"),
    ] {
        let error = refusal(LEAST, &[set]);
        assert!(error.starts_with("--set: ") && error.contains(parts), "{set}: {error}");
    }
    assert!(refusal("train = 3", &[]).contains("expected a table [train], found integer"));
    assert!(refusal("[train", &[]).contains("r.toml:1: not valid TOML"));
}

#[test]
fn impossible_values_are_refused_by_key() {
    for (set, parts) in [
        ("method.r=0", "`method.r`: `r` should be a positive integer value but the value passed is 0"),
        ("method.alpha=0", "above 0, found 0"),
        ("method.dropout=1", "[0, 1), found 1"),
        ("method.dropout=nan", "found NaN"),
        ("method.target_modules=[]", "at least one"),
        (
            "method.feedforward_modules=['up_proj']",
            "`method.feedforward_modules`: expected `method.kind` to be \"ia3\"",
        ),
        ("method.layers_pattern='layers'", "`method.layers_to_transform` to be given too"),
        ("method.init_weights='zero'", "`method.kind` to be \"p-tuning-v2\", found lora"),
        ("train.loraplus_lr_embedding=1e-6", "`train.loraplus_lr_ratio` to be given too"),
        ("data.max_length=1", "at least 2 tokens"),
        ("data.train=[]", "`data.train`: expected a file"),
        ("data.train=[{path = 'x', weight = 0}]", "a weight above 0 and at most 1000 for x, found 0"),
        ("data.train=[{path = 'x', weight = -1}]", "found -1"),
        ("data.valid_limit=3", "`data.valid` to be given too"),
        ("data.columns={prompt = 'q'}", "expected columns among question, answer, found `prompt`"),
        (
            "data.train=[{path = 'x', format = 'alpaca', columns = {answer = 'a'}}]",
            "columns for x: expected columns among",
        ),
        ("data.train=[{path = 'x', format = 'pubmedqa', columns = {answer = 'a'}}]", "fixed names"),
        ("method.layers=3", "`method.kind` to be \"freeze\", found lora"),
        ("train.batch_size=0", "`train.batch_size`: expected a positive integer, found 0"),
        ("train.gradient_accumulation=0", "positive"),
        ("train.max_steps=0", "positive"),
        ("train.epochs=0", "above 0"),
        ("train.learning_rate=0", "above 0"),
        ("train.learning_rate=inf", "above 0, found inf"),
        ("train.weight_decay=-0.1", "0 or more"),
        ("train.betas=[0.9, 1.0]", "[0, 1)"),
        ("train.epsilon=0", "above 0"),
        ("train.max_grad_norm=-1", "0 or more"),
        ("train.keep=0", "positive"),
        ("train.save_every=0", "positive"),
        ("train.eval_every=5", "`data.valid` to be given too"),
        ("model.path=", "`model.path`: expected a model"),
    ] {
        let error = refusal(LEAST, &[set]);
        let key = set.split_once('=').unwrap().0;
        assert!(error.starts_with(&format!("--set: `{key}`: ")) && error.contains(parts), "{set}: {error}");
    }
    let both = refusal(LEAST, &["train.epochs=1", "train.max_steps=2"]);
    assert!(both.contains("either `train.epochs` or `train.max_steps`"), "{both}");
    assert!(refusal(LEAST, &["method.kind=full", "method.init=a"]).contains("`method.kind`"));
    let order = refusal(LEAST, &["data.shuffle=false", "data.group_by_length=true"]);
    assert!(order.contains("`data.group_by_length`: expected `data.shuffle` to be true too, found false"), "{order}");
    let none = refusal(LEAST, &["method.kind=freeze", "method.layers=0"]);
    assert!(none.starts_with("--set: `method.layers`: expected the last n blocks as n"), "{none}");
    assert!(refusal("", &[]).starts_with("r.toml: `model.path`"));
    let ia3 = ["method.kind=ia3", "method.target_modules=['v_proj']", "method.feedforward_modules=['up_proj']"];
    assert!(refusal(LEAST, &ia3).contains("some of `method.target_modules`"));
    let loftq = |sets: &[&str]| refusal(LEAST, &[&["method.init_lora_weights=loftq"], sets].concat());
    assert!(
        loftq(&[])
            .contains("`method.init_lora_weights`: expected `method.kind = \"qlora\"` with `model.dtype = \"nf4\"`")
    );
    let blocks = loftq(&["method.kind=qlora"]);
    assert!(blocks.contains("`model.dtype`: expected \"nf4\"") && blocks.contains("found \"packed\""), "{blocks}");
    let nf4 = ["method.kind=qlora", "model.dtype=nf4"];
    let often = loftq(&[&nf4[..], &["method.loftq_iter=5"]].concat());
    assert!(often.contains("`method.loftq_iter`: expected 1: with more") && often.ends_with("found 5"), "{often}");
    assert!(
        refusal(LEAST, &["method.loftq_iter=1"]).contains("`method.init_lora_weights` to be \"loftq\", found true")
    );
    for sets in [&nf4[..], &["method.kind=qlora", "model.path=folder"]] {
        parse(LEAST, &[&["method.init_lora_weights=loftq"], sets].concat()).unwrap();
    }
    let prefix = |sets: &[&str]| refusal(LEAST, &[&["method.kind=p-tuning-v2"], sets].concat());
    assert!(prefix(&["method.init_weights=ones"]).contains("\"zero\", or nothing"));
    assert!(prefix(&["method.init_weights=zero", "method.init_text=a"]).contains("no `method.init_text` beside it"));
}

#[test]
fn a_source_is_read_as_it_says_or_as_the_table_says() {
    let sets = [
        "data.columns={question = 'prompt'}",
        "data.train=['a', {path = 'b', columns = {answer = 'reply'}}, {path = 'c', format = 'alpaca'}, {path = 'd', format = 'qa'}]",
    ];
    let data = parse(LEAST, &sets).unwrap().data;
    let names: Vec<_> = data
        .train
        .iter()
        .map(|source| data.schema(Some(source)))
        .map(|schema| {
            (
                schema.certain().map(|schema| schema.format),
                schema.columns.name("question").to_owned(),
                schema.columns.name("answer").to_owned(),
            )
        })
        .collect();
    let row = |format, question: &str, answer: &str| (format, question.to_owned(), answer.to_owned());
    assert_eq!(
        names,
        [
            row(Some(Format::Qa), "prompt", "answer"),
            row(Some(Format::Qa), "question", "reply"),
            row(Some(Format::Alpaca), "question", "answer"),
            row(Some(Format::Qa), "prompt", "answer"),
        ]
    );
    assert_eq!(data.schema(None).columns.name("question"), "prompt");
}

#[test]
fn freeze_learns_the_last_two_blocks_unless_it_is_told() {
    let layers =
        |sets: &[&str]| parse(LEAST, &[&["method.kind=freeze"], sets].concat()).unwrap().method.common.layers.unwrap();
    assert_eq!(layers(&[]), TrainableLayers::default());
    assert_eq!(layers(&["method.layers=-3"]), TrainableLayers { count: -3, ..TrainableLayers::default() });
    let extra_modules = vec!["norm".to_owned()];
    assert_eq!(layers(&["method.layers={extra_modules = ['norm']}"]), TrainableLayers { count: 2, extra_modules });
    let recipe = parse(LEAST, &["method.kind=freeze"]).unwrap();
    assert_eq!(recipe.train.optimizer.learning_rate, Some(2e-5));
    assert_eq!(parse(LEAST, &[]).unwrap().method.common.layers, None);
}

#[test]
fn a_method_has_one_name_in_recipes_and_on_the_command_line() {
    for kind in MethodKind::value_variants() {
        let option = kind.to_possible_value().unwrap();
        assert_eq!(serde_json::to_value(kind).unwrap().as_str(), Some(option.get_name()));
    }
}

#[test]
fn steps_are_counted() {
    let steps = StepsConfig { epochs: Some(1.5), ..StepsConfig::default() };
    assert_eq!(steps.total_steps(3), 5);
    assert_eq!(StepsConfig { max_steps: Some(7), epochs: None, ..steps }.total_steps(3), 7);
    assert_eq!((Warmup::Ratio(0.03).steps(100), Warmup::Ratio(0.03).steps(101), Warmup::Steps(5).steps(9)), (3, 4, 5));
}

#[test]
fn every_recipe_of_the_folder_loads_and_every_method_has_one() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut kinds = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let recipe = Recipe::parse(&text, &path, &[]).unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        // The command in the comment at the head of the file names the file itself.
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(text.contains(&format!("medqa train apps/medqa/recipes/{name}")), "{name}");
        let written = recipe.to_toml().unwrap();
        assert_eq!(Recipe::parse(&written, &path, &[]).unwrap(), recipe, "{name}");
        kinds.insert(serde_json::to_value(recipe.method.common.kind).unwrap().as_str().unwrap().to_owned());
    }
    let all = ["adalora", "dora", "freeze", "full", "ia3", "lora", "p-tuning", "p-tuning-v2", "prompt", "qlora"];
    assert!(kinds.iter().map(String::as_str).eq(all), "{kinds:?}");
}
