//! The step loop.

use super::{
    freeze::freeze,
    record::{Metrics, peak_rss_bytes},
};
use crate::{
    backend::{Inference, Training},
    data::{Encoded, Schema, encode, epoch_order, read},
    eval::mean_loss,
    model::{self, Loaded},
    recipe::{Checkpointing as Recompute, Data, Dtype, MethodKind, Recipe, Scheduler, TargetModules as Targets},
    write,
};
use anyhow::{Context, Result, bail};
use burn::{module::AutodiffModule, tensor::DType};
use burn_llama::{Example, Layout, Llama, Tokenizer, checkpoint};
use burn_peft::{LoraConfig, Noise, Pass, TargetModules, adapter, param};
use burn_zero::{
    Engine,
    optimizer::AdamW,
    schedule::{Kind, Schedule},
    segment::Checkpointing,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

const ADAPTER: &str = "default";

/// A run under way.
struct Run {
    recipe: Recipe,
    directory: PathBuf,
    model: Llama<Training>,
    engine: Engine<Training>,
    lora: Option<LoraConfig>,
    tokenizer: Tokenizer,
    sources: Vec<Vec<Example>>,
    valid: Vec<Example>,
    metrics: Metrics,
    progress: ProgressBar,
    start: Instant,
    tokens: usize,
    /// Seconds spent in steps, evaluations and saves aside.
    stepping: f64,
    saved: Vec<PathBuf>,
}

/// The verb `train`.
pub fn train(path: &Path, sets: &[String], directory: Option<PathBuf>) -> Result<()> {
    let recipe = Recipe::load(path, sets)?;
    let name = path.file_stem().unwrap_or_default();
    let directory = directory.unwrap_or_else(|| Path::new("runs").join(name));
    if directory.read_dir().is_ok_and(|mut files| files.next().is_some()) {
        bail!("{}: the run folder is not empty; choose another with --dir", directory.display());
    }
    let loaded = model::base::<Training>(&recipe.model.path, stored(recipe.model.dtype))?;
    let mut run = Run::new(recipe, directory, loaded)?;
    let before = run.evaluate(0)?;
    let steps = run.steps();
    run.progress.set_length(steps as u64);
    for step in 0..steps {
        run.step(step, steps)?;
    }
    run.finish(before, steps)
}

impl Run {
    fn new(recipe: Recipe, directory: PathBuf, loaded: Loaded<Training>) -> Result<Self> {
        let data = &recipe.data;
        let sources = data.train.iter();
        let sources = sources.map(|source| rows(&loaded, data, &source.path, &data.schema(Some(source))));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        let valid = data.valid.as_ref().map(|path| rows(&loaded, data, path, &data.schema(None)));
        let mut valid = valid.transpose()?.unwrap_or_default();
        valid.truncate(data.valid_limit.unwrap_or(usize::MAX));
        let (model, lora) = adapt(loaded.model, &recipe)?;
        let clip = Some(recipe.train.optimizer.max_grad_norm).filter(|&norm| norm > 0.0);
        let engine = Engine::new(optimizer(&recipe), clip, checkpointing(&recipe));
        fs::create_dir_all(&directory).with_context(|| format!("{}: cannot be made", directory.display()))?;
        write::whole(&directory.join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
        let metrics = Metrics::create(&directory.join("metrics.jsonl"))?;
        let progress =
            ProgressBar::new(0).with_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?);
        let (start, saved) = (Instant::now(), Vec::new());
        Ok(Self {
            recipe,
            directory,
            model,
            engine,
            lora,
            tokenizer: loaded.tokenizer,
            sources,
            valid,
            metrics,
            progress,
            start,
            tokens: 0,
            stepping: 0.0,
            saved,
        })
    }

    /// Rows per optimizer step.
    fn rows_per_step(&self) -> usize {
        self.recipe.train.steps.batch_size * self.recipe.train.steps.gradient_accumulation
    }

    fn order(&self, epoch: usize) -> Vec<(usize, usize)> {
        let sources = self.sources.iter().zip(&self.recipe.data.train);
        let sizes: Vec<_> = sources.map(|(rows, source)| (rows.len(), source.weight)).collect();
        epoch_order(&sizes, self.recipe.train.steps.seed, epoch as u64, self.recipe.data.shuffle)
    }

    fn steps_per_epoch(&self) -> usize {
        self.order(0).len().div_ceil(self.rows_per_step())
    }

    fn steps(&self) -> usize {
        self.recipe.train.steps.total(self.order(0).len())
    }

    fn schedule(&self, total: usize) -> Schedule {
        let train = &self.recipe.train;
        let kind = match train.schedule.scheduler {
            Scheduler::Constant => Kind::Constant,
            Scheduler::Linear => Kind::Linear,
            Scheduler::Cosine => Kind::Cosine,
            Scheduler::WarmupLR => Kind::WarmupLr,
            Scheduler::WarmupDecayLR => Kind::WarmupDecayLr,
            Scheduler::WarmupCosineLR => Kind::WarmupCosineLr,
        };
        let peak = train.optimizer.learning_rate.unwrap_or_default();
        Schedule { kind, peak, warmup: train.schedule.warmup.steps(total), total }
    }

    fn step(&mut self, step: usize, steps: usize) -> Result<()> {
        let (begin, per_epoch, per_step) = (Instant::now(), self.steps_per_epoch(), self.rows_per_step());
        let order = self.order(step / per_epoch);
        let first = step % per_epoch * per_step;
        let rows = order[first..order.len().min(first + per_step)].iter();
        let rows: Vec<Example> = rows.map(|&(source, row)| self.sources[source][row].clone()).collect();
        let targets: usize = rows.iter().map(Example::targets).sum();
        let tokens: usize = rows.iter().map(|row| row.ids.len()).sum();
        let mut loss = 0.0;
        for (index, micro) in rows.chunks(self.recipe.train.steps.batch_size).enumerate() {
            let lengths: Vec<usize> = micro.iter().map(|row| row.ids.len()).collect();
            let layout = Layout::of(&lengths, self.recipe.data.packing);
            let tokens = layout.tokens((index * self.recipe.train.steps.batch_size) as u64);
            let noise = Noise { seed: self.recipe.train.steps.seed, step: step as u64, tokens };
            let batch = self.model.batch(micro, &layout, 1.0 / targets as f32, Pass::training(noise))?;
            loss += self.engine.accumulate(&self.model, &batch);
        }
        let learning_rate = self.schedule(steps).at(step);
        let report = self.engine.step(&mut self.model, learning_rate)?;
        self.tokens += tokens;
        let seconds = begin.elapsed().as_secs_f64();
        self.stepping += seconds;
        let speed = tokens as f64 / seconds;
        self.metrics.write(&json!({
            "step": step + 1, "epoch": (step + 1) as f64 / per_epoch as f64, "loss": loss,
            "learning_rate": learning_rate, "grad_norm": report.grad_norm, "tokens": tokens,
            "target_tokens": targets, "tokens_per_second": speed,
            "elapsed_seconds": self.start.elapsed().as_secs_f64(), "peak_rss_bytes": peak_rss_bytes(),
        }))?;
        self.show(step + 1, steps, format!("loss {loss:.4}, {speed:.0} tokens/s"));
        let train = &self.recipe.train;
        let (evaluate, save) = (train.saving.eval_every, train.saving.save_every);
        if evaluate.is_some_and(|every| (step + 1).is_multiple_of(every)) && step + 1 < steps {
            self.evaluate(step + 1)?;
        }
        if save.is_some_and(|every| (step + 1).is_multiple_of(every)) && step + 1 < steps {
            self.checkpoint(step + 1)?;
        }
        Ok(())
    }

    /// A progress bar on a terminal, a line every tenth of the way otherwise.
    fn show(&self, step: usize, steps: usize, message: String) {
        if self.progress.is_hidden() {
            if step == 1 || step.is_multiple_of((steps / 10).max(1)) || step == steps {
                let left = self.start.elapsed().as_secs_f64() / step as f64 * (steps - step) as f64;
                eprintln!("step {step}/{steps}: {message}, {left:.0} s left");
            }
        } else {
            self.progress.set_message(message);
            self.progress.set_position(step as u64);
        }
    }

    fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
        if self.valid.is_empty() {
            return Ok(None);
        }
        let model: Llama<Inference> = self.model.valid();
        let (loss, _) = mean_loss(&model, &self.valid, (self.recipe.train.steps.batch_size, self.recipe.data.packing))?;
        self.metrics.write(&json!({
            "step": step, "valid_loss": loss, "elapsed_seconds": self.start.elapsed().as_secs_f64(),
        }))?;
        let message = format!("step {step}: validation loss {loss:.4}");
        if self.progress.is_hidden() {
            eprintln!("{message}")
        } else {
            self.progress.println(message)
        }
        Ok(Some(loss))
    }

    /// Writes what is trained into `directory`: `adapter/` or `model/`.
    fn save(&self, directory: &Path) -> Result<()> {
        match &self.lora {
            Some(config) => adapter::save(&self.model, ADAPTER, config, &directory.join("adapter"))?,
            None => {
                let directory = directory.join("model");
                checkpoint::save(&self.model, &directory)?;
                self.tokenizer.save(&directory)?;
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self, step: usize) -> Result<()> {
        let directory = self.directory.join(format!("checkpoint-{step}"));
        self.save(&directory)?;
        self.saved.push(directory);
        while self.saved.len() > self.recipe.train.saving.keep {
            let old = self.saved.remove(0);
            fs::remove_dir_all(&old).with_context(|| format!("{}: cannot be removed", old.display()))?;
        }
        Ok(())
    }

    fn finish(mut self, before: Option<f64>, steps: usize) -> Result<()> {
        let after = self.evaluate(steps)?;
        let directory = self.directory.clone();
        self.save(&directory)?;
        self.progress.finish_and_clear();
        let seconds = self.start.elapsed().as_secs_f64();
        let summary = json!({
            "valid_loss_before": before, "valid_loss_after": after, "steps": steps, "seconds": seconds,
            "tokens": self.tokens, "tokens_per_second": self.tokens as f64 / self.stepping,
            "peak_rss_bytes": peak_rss_bytes(),
            "trainable_parameters": param::count_trainable::<Training, _>(&self.model),
        });
        write::whole(&directory.join("summary.json"), format!("{summary:#}\n").as_bytes())?;
        println!("{summary}");
        Ok(())
    }
}

/// Puts the method onto the model and freezes the rest.
fn adapt(mut model: Llama<Training>, recipe: &Recipe) -> Result<(Llama<Training>, Option<LoraConfig>)> {
    match recipe.method.kind {
        MethodKind::Full => return Ok((model, None)),
        MethodKind::Freeze => {
            return Ok((freeze(model, &recipe.method.layers.clone().unwrap_or_default())?, None));
        }
        MethodKind::Lora => {}
    }
    let config = match &recipe.method.init {
        Some(directory) => {
            let (config, unknown) = adapter::load(&mut model, ADAPTER, Path::new(directory))?;
            model::warn_unknown(Path::new(directory), &unknown);
            config
        }
        None => {
            let config = lora(recipe);
            adapter::attach(&mut model, ADAPTER, &config, recipe.train.steps.seed)?;
            config
        }
    };
    Ok((param::train_only(model, adapter::is_adapter), Some(config)))
}

fn stored(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::BF16,
    }
}

fn optimizer(recipe: &Recipe) -> AdamW {
    let optimizer = &recipe.train.optimizer;
    AdamW { betas: optimizer.betas.into(), epsilon: optimizer.epsilon, weight_decay: optimizer.weight_decay }
}

fn checkpointing(recipe: &Recipe) -> Checkpointing {
    match recipe.train.steps.activation_checkpointing {
        Recompute::None => Checkpointing::None,
        Recompute::Full => Checkpointing::Full,
        Recompute::Every(k) => Checkpointing::Every(k),
    }
}

fn lora(recipe: &Recipe) -> LoraConfig {
    let method = &recipe.method;
    LoraConfig {
        r: method.r,
        lora_alpha: method.alpha,
        lora_dropout: method.dropout,
        use_rslora: method.use_rslora,
        target_modules: match &method.target_modules {
            Targets::Names(names) => TargetModules::Suffixes(names.clone()),
            Targets::Pattern(pattern) => TargetModules::Pattern(pattern.clone()),
        },
        base_model_name_or_path: Some(recipe.model.path.clone()),
    }
}

/// The examples of a file.
fn rows(loaded: &Loaded<Training>, data: &Data, path: &str, schema: &Schema) -> Result<Vec<Example>> {
    let rows = read(Path::new(path), schema)?;
    let encoded = encode(&loaded.tokenizer, &rows, data.max_length, data.on_too_long);
    let encoded = encoded.with_context(|| path.to_owned())?;
    report(path, &encoded);
    loaded.model.accepts(&encoded.examples).with_context(|| path.to_owned())?;
    Ok(encoded.examples)
}

fn report(path: &str, encoded: &Encoded) {
    let Encoded { examples, truncated, dropped, without_target } = encoded;
    eprintln!(
        "{}: {} rows, {truncated} truncated, {dropped} dropped as too long, {without_target} without a token to learn",
        path,
        examples.len()
    );
}
