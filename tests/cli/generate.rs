//! Tests of `generate` against a scripted API: its file is the same however the answers come, and nothing is lost,
//! overspent or leaked.

use crate::{
    mock_api::{MockApi, MockReply, MockRequest, answer_body},
    work::{CommandOutput, WorkDir},
};
use serde_json::{Value, json};
use std::{
    collections::HashSet,
    fs,
    process::Stdio,
    thread::sleep,
    time::{Duration, SystemTime},
};

/// A key that must stand in no file and no message.
pub(crate) const KEY: &str = "sk-mock-5ecret-key";

pub(crate) fn work() -> WorkDir {
    let work = WorkDir::new();
    let words = ["cough", "fever", "rash", "nausea", "vertigo", "fatigue"];
    let seed = |word: &str| json!({"question": format!("What causes {word}?"), "answer": "Several things."});
    work.write("seeds.jsonl", &words.map(|word| seed(word).to_string() + "\n").concat());
    work
}

/// Runs `generate METHOD` with the mock.
pub(crate) fn generate(work: &WorkDir, api: &MockApi, method: &str, rest: &[&str]) -> CommandOutput {
    let arguments = [&["generate", method, "--base-url", &api.url, "--model", "mock"], rest].concat();
    work.command(&arguments).env("OPENAI_API_KEY", KEY).output().unwrap().into()
}

fn self_instruct(work: &WorkDir, api: &MockApi, out: &str, rest: &[&str]) -> CommandOutput {
    generate(work, api, "self-instruct", &[&["--seeds", "seeds.jsonl", "--out", out], rest].concat())
}

/// Tasks that depend on the request alone; some resemble each other, some cannot be used.
fn tasks(request: &MockRequest) -> MockReply {
    let digest = request.digest();
    let task = |index: u64| {
        let (n, number) = (digest.rotate_left(index as u32 * 7), index + 4);
        let word = |shift: u32| format!("w{}", (n >> shift) % 5000);
        let instruction = match n % 7 {
            0 => "Explain what causes a cough in adults today".to_owned(),
            1 => "Draw a picture of the heart".to_owned(),
            _ => format!("Explain {} and {} to {} with {}", word(3), word(13), word(23), word(33)),
        };
        let label = if index == 0 { String::new() } else { format!("{number}. Instruction: ") };
        format!("{label}{instruction}\n{number}. Input: <noinput>\n{number}. Output: Answer {}.\n###\n", n % 1000)
    };
    MockReply::answer(&(0..3).map(task).collect::<String>())
}

fn slow_tasks(request: &MockRequest) -> MockReply {
    sleep(Duration::from_millis(request.digest() % 40));
    tasks(request)
}

/// The count of one kind in the report.
pub(crate) fn report(work: &WorkDir, out: &str) -> Value {
    work.json(&format!("{out}.generate/report.json"))
}

/// Fails if the key stands in a byte of the folder, or in the output.
fn assert_no_key(work: &WorkDir, done: &CommandOutput) {
    assert!(!format!("{done:?}").contains(KEY), "{done:?}");
    for (path, _) in work.listing() {
        let bytes = if path.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        assert!(!bytes.windows(KEY.len()).any(|window| window == KEY.as_bytes()), "{}", path.display());
    }
}

#[test]
fn the_file_does_not_depend_on_the_order_of_answers() {
    let work = work();
    let api = MockApi::start(slow_tasks);
    let mut texts = HashSet::new();
    for concurrency in ["1", "16", "64"] {
        let out = format!("{concurrency}.jsonl");
        let done = self_instruct(&work, &api, &out, &["-n", "60", "--concurrency", concurrency]);
        assert_eq!(done.code, Some(0), "{done:?}");
        assert_eq!(done.json()["rows"], 60);
        texts.insert(work.text(&out));
        let report = report(&work, &out);
        assert!(report["removed"]["asks for something else than text"].as_u64() > Some(0), "{report}");
        assert!(report["removed"]["question asked before"].as_u64() > Some(0), "{report}");
        assert_no_key(&work, &done);
    }
    assert_eq!(texts.len(), 1, "the files are equal");
    assert!(api.requests().iter().all(|r| r.head.contains(&format!("Bearer {KEY}"))));
    let row = &work.lines("1.jsonl")[0];
    let source = &row["source"];
    assert_eq!((&source["method"], &source["model"]), (&json!("self-instruct"), &json!("mock")));
    for key in ["recipe_sha", "request_key", "created", "seed_ids", "prompt_version"] {
        assert!(!source[key].is_null(), "{key}: {row}");
    }
    // A second run asks nothing, and training reads the rows.
    let before = (api.count(), work.text("16.jsonl"));
    let again = self_instruct(&work, &api, "16.jsonl", &["-n", "60"]);
    assert_eq!((again.code, api.count(), work.text("16.jsonl")), (Some(0), before.0, before.1));
    work.succeed(&["data", "check", "--model", "turns", "--format", "alpaca", "1.jsonl"]);
}

#[test]
fn a_killed_run_goes_on_to_the_same_file() {
    let work = work();
    let api = MockApi::start(slow_tasks);
    let limits = ["-n", "80", "--concurrency", "16"];
    assert_eq!(self_instruct(&work, &api, "whole.jsonl", &limits).code, Some(0));
    let unbroken = api.count();
    for kill in 0..4 {
        let arguments =
            ["generate", "self-instruct", "--base-url", &api.url, "--model", "mock", "--seeds", "seeds.jsonl"];
        let mut command = work.command(&[&arguments[..], &["--out", "broken.jsonl"], &limits].concat());
        let mut run = command.env("OPENAI_API_KEY", KEY).stderr(Stdio::null()).spawn().unwrap();
        let journal = work.at("broken.jsonl.generate/journal.jsonl");
        while fs::read_to_string(&journal).unwrap_or_default().lines().count() < 10 + 15 * kill {
            assert!(run.try_wait().unwrap().is_none(), "the run ends only when it is killed");
            sleep(Duration::from_millis(1));
        }
        run.kill().unwrap();
        run.wait().unwrap();
        assert!(!work.at("broken.jsonl.part").exists());
    }
    let done = self_instruct(&work, &api, "broken.jsonl", &limits);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert_eq!(work.text("broken.jsonl"), work.text("whole.jsonl"));
    // Each kill loses the answers in flight at most; the last requests of a run are more or fewer by as many.
    let broken = api.count() - unbroken;
    assert!(broken <= unbroken + 5 * 16, "{broken} requests, {unbroken} without a kill");
}

#[test]
fn failures_that_pass_are_waited_for() {
    let work = work();
    let date = |seconds: u64| {
        let time = SystemTime::now() + Duration::from_secs(seconds);
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        http_date(seconds)
    };
    let api = MockApi::start(move |request| {
        let limited = |header, value| MockReply::Status {
            code: 429,
            headers: vec![(header, value)],
            body: r#"{"error": {"message": "slow down", "type": "rate_limit_error"}}"#.to_owned(),
        };
        match request.number {
            1 => limited("Retry-After", "1".to_owned()),
            3 => limited("retry-after-ms", "700".to_owned()),
            5 => limited("Retry-After", date(2)),
            7..=9 => MockReply::status(503, "busy"),
            11 => MockReply::Cut,
            13 => MockReply::Stall,
            15 => MockReply::Body(r#"{"error": {"message": "upstream", "code": 502}}"#.to_owned()),
            17 => MockReply::Body("<html>gateway</html>".to_owned()),
            19 => MockReply::Body(String::new()),
            _ => tasks(request),
        }
    });
    let limits = ["-n", "24", "--concurrency", "1", "--set", "api.timeout_seconds=4"];
    let done = self_instruct(&work, &api, "rows.jsonl", &limits);
    assert_eq!(done.code, Some(0), "{done:?}");
    let quiet = MockApi::start(tasks);
    assert_eq!(self_instruct(&work, &quiet, "quiet.jsonl", &limits).code, Some(0));
    assert_eq!(work.text("rows.jsonl"), work.text("quiet.jsonl"));
    let (report, requests) = (report(&work, "rows.jsonl"), api.requests());
    // More than 11 if the machine is so busy that another answer takes too long.
    assert!(report["retries"].as_u64() >= Some(11) && report["failed"] == 0, "{report}");
    // The cut connection, the stall and the page may have cost their tokens.
    assert!(report["estimated_usage"].as_u64() >= Some(3), "{report}");
    for (number, least, most) in [(1, 1.0, 4.0), (3, 0.7, 3.7), (5, 1.0, 5.0)] {
        let waited = (requests[number + 1].at - requests[number].at).as_secs_f64();
        assert!((least..=most).contains(&waited), "request {number}: waited {waited} s");
    }
}

/// Formats a time as HTTP does.
fn http_date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days, after Hinnant.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][(days % 7) as usize];
    let names = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (name, h, m, s) = (names[month as usize - 1], rest / 3600, rest / 60 % 60, rest % 60);
    format!("{weekday}, {day:02} {name} {year} {h:02}:{m:02}:{s:02} GMT")
}

#[test]
fn failures_that_stay_end_the_run_after_the_first() {
    let quota = format!(r#"{{"error": {{"message": "no money for {KEY}", "code": "insufficient_quota"}}}}"#);
    let unknown = format!(r#"{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}"#);
    let page = "<!DOCTYPE html><html><body>Welcome</body></html>".to_owned();
    for (code, body, words) in [
        (429, quota, "answered 429: no money for ***"),
        (401, unknown, "answered 401: Incorrect API key provided: ***"),
        (403, "{}".to_owned(), "answered 403"),
        (404, page.clone(), "answered 404"),
        (200, page, "found an HTML page"),
        (302, String::new(), "answered 302"),
    ] {
        let work = work();
        let api = MockApi::start(move |_| MockReply::status(code, &body));
        let done = self_instruct(&work, &api, "rows.jsonl", &["-n", "20", "--concurrency", "16"]);
        assert_eq!((done.code, api.count()), (Some(2), 1), "{done:?}");
        let errors: Vec<_> = done.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(words), "{code}: {done:?}");
        assert!(!work.at("rows.jsonl").exists());
        assert_no_key(&work, &done);
    }
}

#[test]
fn requests_that_fail_for_good_are_given_up_and_too_many_end_the_run() {
    let work = work();
    let api = MockApi::start(|request| match request.digest() % 10 {
        0 => MockReply::status(400, r#"{"error": {"message": "too long"}}"#),
        _ => tasks(request),
    });
    let done = self_instruct(&work, &api, "some.jsonl", &["-n", "20"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    let api = MockApi::start(|_| MockReply::status(422, r#"{"error": {"message": "no such thing"}}"#));
    let done = self_instruct(&work, &api, "none.jsonl", &["-n", "20"]);
    assert!(done.code == Some(2) && done.stderr.contains("6 of the last 6 requests failed; mostly"), "{done:?}");
    let mut dead = api;
    dead.url = "http://127.0.0.1:9/v1".to_owned();
    let done = self_instruct(&work, &dead, "dead.jsonl", &["-n", "20"]);
    assert!(done.code == Some(2) && done.stderr.contains("127.0.0.1:9"), "{done:?}");
    // A method without an end that gives no row does not spend for ever.
    let api = MockApi::start(|_| MockReply::answer("Explain it to me now.\n4. Input:\n4. Output: No."));
    let done = self_instruct(&work, &api, "same.jsonl", &["-n", "20", "--concurrency", "16"]);
    let words = "the last 200 items gave no row; most were removed for: question asked before";
    assert!(done.code == Some(2) && done.stderr.contains(words) && api.count() < 300, "{done:?}");
}

#[test]
fn a_budget_is_never_exceeded_and_a_higher_one_goes_on() {
    let work = work();
    let api = MockApi::start(slow_tasks);
    let limits = ["-n", "60", "--concurrency", "8", "--set", "sampling.max_tokens=300"];
    assert_eq!(self_instruct(&work, &api, "whole.jsonl", &limits).code, Some(0));
    let price = ["--set", "api.price.input=1000", "--set", "api.price.output=2000", "--set", "api.price.currency=EUR"];
    for (option, first, allowed) in
        [("--budget-tokens", "3000", 3000.0 / 120.0), ("--budget-money", "2.5", 2.5 / 0.14), ("--requests", "9", 9.0)]
    {
        let out = format!("{}.jsonl", &option[2..]);
        let before = api.count();
        let run = |limit: &str| self_instruct(&work, &api, &out, &[&limits[..], &price, &[option, limit]].concat());
        let done = run(first);
        assert_eq!(done.code, Some(3), "{done:?}");
        assert!(done.stderr.contains("stopped at the budget of ") && done.stderr.contains(option), "{done:?}");
        // By the server's own count: each answer has 120 tokens, which cost 0.14.
        let sent = api.count() - before;
        assert!(sent > 2 && sent as f64 <= allowed, "{option}: {sent} requests, at most {allowed}");
        let rows = work.text(&out);
        assert!(work.text("whole.jsonl").starts_with(&rows) && !rows.is_empty(), "{option}");
        assert_eq!(run("1000000").code, Some(0));
        assert_eq!(work.text(&out), work.text("whole.jsonl"), "{option}");
    }
    let done = self_instruct(&work, &api, "x.jsonl", &["--budget-money", "1", "-n", "5"]);
    assert!(done.code == Some(2) && done.stderr.contains("`[api.price]`"), "{done:?}");
}

#[test]
fn a_dry_run_sends_nothing_and_is_about_right() {
    let work = work();
    // Answers as long as the method expects.
    let api = MockApi::start(|request| {
        let MockReply::Body(body) = tasks(request) else { unreachable!() };
        let mut body: Value = serde_json::from_str(&body).unwrap();
        body["usage"] = json!({"prompt_tokens": request.prompt().len() / 4, "completion_tokens": 1900});
        MockReply::Body(body.to_string())
    });
    let limits = ["--requests", "10", "--set", "api.price.input=1", "--set", "api.price.output=4"];
    let dry = self_instruct(&work, &api, "rows.jsonl", &[&limits[..], &["--dry-run"]].concat());
    assert_eq!((dry.code, api.count()), (Some(0), 0), "{dry:?}");
    assert!(!work.at("rows.jsonl.generate").exists());
    let expected = dry.stdout.lines().find_map(|line| line.strip_prefix("expected   ")).unwrap();
    let numbers: Vec<f64> = expected.split(' ').filter_map(|word| word.trim_end_matches(',').parse().ok()).collect();
    let run = self_instruct(&work, &api, "rows.jsonl", &limits);
    assert_eq!((run.code, api.count()), (Some(0), 10), "{run:?}");
    let report = run.json();
    for (estimate, key) in numbers.iter().zip(["prompt_tokens", "completion_tokens", "money"]) {
        let found = report[key].as_f64().unwrap();
        assert!((estimate / found - 1.0).abs() < 0.3, "{key}: estimated {estimate}, found {found}");
    }
}

#[test]
fn numbers_of_people_do_not_leave_the_machine() {
    let work = work();
    let api = MockApi::start(tasks);
    let row = json!({"question": "Who is 13812345678 to call?", "answer": "Nobody."}).to_string();
    work.write("seeds.jsonl", &(work.text("seeds.jsonl") + &row));
    let done = self_instruct(&work, &api, "rows.jsonl", &["-n", "5"]);
    assert_eq!((done.code, api.count()), (Some(2), 0), "{done:?}");
    assert!(done.stderr.contains("seeds.jsonl: line 7: a phone number") && !done.stderr.contains("1381"), "{done:?}");
    assert_eq!(self_instruct(&work, &api, "rows.jsonl", &["-n", "5", "--allow-personal-data"]).code, Some(0));
}

#[test]
fn a_batch_file_gives_the_rows_of_a_run() {
    let work = work();
    let api = MockApi::start(tasks);
    let limits = ["--requests", "20"];
    let batch = |rest: &[&str]| {
        let arguments = ["--model", "mock", "--base-url", &api.url, "--seeds", "seeds.jsonl", "--out", "batch.jsonl"];
        work.run(&[&["generate", "self-instruct"], &arguments[..], &limits, rest].concat())
    };
    let done = batch(&["--batch-out", "requests.jsonl"]);
    assert_eq!((done.code, api.count()), (Some(0), 0), "{done:?}");
    let requests = work.lines("requests.jsonl");
    assert_eq!(requests.len(), 20);
    let reply = |request: &Value| {
        assert_eq!((&request["method"], &request["url"]), (&json!("POST"), &json!("/v1/chat/completions")));
        let seen = MockRequest {
            number: 0,
            head: String::new(),
            body: request["body"].clone(),
            at: std::time::Instant::now(),
        };
        let MockReply::Body(body) = tasks(&seen) else { unreachable!() };
        let body: Value = serde_json::from_str(&body).unwrap();
        json!({"custom_id": request["custom_id"], "response": {"status_code": 200, "body": body}, "error": null})
    };
    let mut results: Vec<Value> = requests.iter().map(reply).collect();
    // Two errors, which the online run has too, and another order.
    let failed = [results[4]["custom_id"].clone(), results[9]["custom_id"].clone()];
    results[4] = json!({"custom_id": failed[0], "response": null, "error": {"message": "expired"}});
    results[9] =
        json!({"custom_id": failed[1], "response": {"status_code": 400, "body": {"error": {"message": "no"}}}});
    results.sort_by_key(|result| result["custom_id"].to_string());
    results.push(json!({"custom_id": "x", "response": {"status_code": 200, "body": answer_body("x")}, "error": null}));
    work.write("results.jsonl", &results.iter().map(|result| format!("{result}\n")).collect::<String>());
    let done = batch(&["--batch-in", "results.jsonl"]);
    assert_eq!((done.code, api.count()), (Some(0), 0), "{done:?}");
    assert_eq!(done.stderr.matches("has failed").count(), 2, "{done:?}");
    assert!(done.stderr.contains("`custom_id` x is no request of this recipe"), "{done:?}");
    let bodies: Vec<String> = [4, 9].map(|n: usize| requests[n]["body"].to_string()).into();
    let online = MockApi::start(move |request| match bodies.contains(&request.body.to_string()) {
        true => MockReply::status(400, "no"),
        false => tasks(request),
    });
    assert_eq!(self_instruct(&work, &online, "online.jsonl", &limits).code, Some(0));
    assert_eq!(work.text("batch.jsonl"), work.text("online.jsonl"));
    // What is open is written once more.
    let done = batch(&["--batch-out", "rest.jsonl"]);
    assert_eq!((done.code, work.lines("rest.jsonl").len()), (Some(0), 2), "{done:?}");
}
