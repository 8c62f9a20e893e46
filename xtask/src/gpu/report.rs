//! The report as markdown.

use serde_json::{Map, Value as Json};

/// Everything that was found.
pub(super) fn markdown(found: &Map<String, Json>) -> String {
    let mut out = String::new();
    let at = |step: &str| found.get(step).filter(|v| v.get("failed").is_none() && v.get("skipped").is_none());
    let machine = found.get("machine").unwrap_or(&Json::Null);
    let said = |key: &str| machine[key].as_str().filter(|s| !s.is_empty()).unwrap_or("unknown").to_owned();
    let head = format!(
        "# awqc on {}\n\nCompute capability {}, driver {}.\n",
        said("device"),
        said("compute_capability"),
        said("driver")
    );
    out.push_str(&head);
    for (step, result) in found {
        for (key, word) in [("failed", "failed"), ("skipped", "was skipped")] {
            if let Some(why) = result[key].as_str() {
                line(&mut out, &format!("\n**Step `{step}` {word}:** {why}"));
            }
        }
    }
    if let Some(tests) = at("tests") {
        line(&mut out, &format!("\nTests on the device: {}.", tests["result"].as_str().unwrap_or("?")));
    }
    let torch = at("torch");
    if let Some(kernels) = at("kernels") {
        products(&mut out, kernels, torch);
    }
    if let Some(torch) = torch {
        let text = format!(
            "\nPyTorch {} copies {:.0} GB/s and multiplies large f16 matrices with {:.0} TFLOP/s.",
            torch["torch"].as_str().unwrap_or("?"),
            number(&torch["copy_gigabytes_per_second"]),
            number(&torch["square_teraops"])
        );
        line(&mut out, &text);
    }
    if let Some(model) = at("model") {
        side_by_side(&mut out, model);
    }
    if let Some(calibration) = at("calibration") {
        calibrated(&mut out, calibration);
    }
    if let Some(shapes) = at("shapes") {
        decoding(&mut out, shapes, at("kernels"), torch);
    }
    out
}

/// Packed products beside PyTorch's f16.
fn products(out: &mut String, kernels: &Json, torch: Option<&Json>) {
    let copy = number(&kernels["copy_gigabytes_per_second"]);
    line(out, &format!("\n## Products\n\nA copy reads and writes {copy:.0} GB/s.\n"));
    line(out, "| type | rows | cols | tokens | µs | GB/s | % of copy | TFLOP/s | error | torch f16 µs | times torch |");
    line(out, "|---|---|---|---|---|---|---|---|---|---|---|");
    for p in list(&kernels["products"]) {
        let same = |t: &&Json| ["rows", "cols", "tokens"].iter().all(|k| t[*k] == p[*k]);
        let other = torch.and_then(|t| list(&t["linears"]).iter().find(same)).map(|t| number(&t["microseconds"]));
        let own = number(&p["microseconds"]);
        let cells = [
            p["type"].as_str().unwrap_or("?").to_owned(),
            p["rows"].to_string(),
            p["cols"].to_string(),
            p["tokens"].to_string(),
            format!("{own:.1}"),
            format!("{:.0}", number(&p["gigabytes_per_second"])),
            format!("{:.0}", 100.0 * number(&p["bandwidth_share"])),
            format!("{:.2}", number(&p["teraops"])),
            format!("{:.1e}", number(&p["error"])),
            other.map_or_else(String::new, |t| format!("{t:.1}")),
            other.map_or_else(String::new, |t| format!("{:.2}", t / own)),
        ];
        line(out, &format!("| {} |", cells.join(" | ")));
    }
}

/// The same artefact on the device and on the processor.
fn side_by_side(out: &mut String, model: &Json) {
    let perplexity = |side: &str| number(&model[side]["perplexity"]);
    let text = format!(
        "\n## Model\n\nPerplexity {:.4} on the device, {:.4} on the processor with the same codes; KL divergence {:.2e}, \
         same top token {:.2} %.\n",
        perplexity("device"),
        perplexity("host"),
        number(&model["device"]["kl_divergence"]),
        100.0 * number(&model["device"]["top1_agreement"])
    );
    line(out, &text);
    speeds(out, &model["bench"]);
}

/// Calibration on the device and on the processor.
fn calibrated(out: &mut String, calibration: &Json) {
    line(out, "\n## Calibration\n\n| on | profile s | compile s | perplexity |\n|---|---|---|---|");
    for (place, name) in [("host", "processor"), ("cuda", "device")] {
        let of = |key: &str| number(&calibration[place][key]);
        let (profile, all) = (of("profile_seconds"), of("seconds"));
        line(out, &format!("| {name} | {profile:.1} | {all:.1} | {:.4} |", of("perplexity")));
    }
}

/// What `awqc bench` measured.
fn speeds(out: &mut String, bench: &Json) {
    line(out, "| test | tokens/s | ± | GB/s | % of copy | p50 ms | p99 ms |\n|---|---|---|---|---|---|---|");
    for t in list(&bench["tests"]) {
        let optional = |v: &Json, f: &dyn Fn(f64) -> String| v.as_f64().map_or_else(String::new, f);
        let cells = [
            t["test"].as_str().unwrap_or("?").to_owned(),
            format!("{:.1}", number(&t["median"])),
            format!("{:.1}", number(&t["deviation"])),
            optional(&t["gigabytes_per_second"], &|v| format!("{v:.0}")),
            optional(&t["bandwidth_share"], &|v| format!("{:.0}", 100.0 * v)),
            optional(&t["token_ms"][0], &|v| format!("{v:.3}")),
            optional(&t["token_ms"][1], &|v| format!("{v:.3}")),
        ];
        line(out, &format!("| {} |", cells.join(" | ")));
    }
}

/// Decoding against what memory allows, and against PyTorch's linears.
fn decoding(out: &mut String, shapes: &Json, kernels: Option<&Json>, torch: Option<&Json>) {
    for shape in list(&shapes["list"]) {
        let config = shape["config"].as_str().unwrap_or("?");
        let bench = &shape["bench"];
        let bytes = number(&bench["bytes_per_token"]);
        // What this program's own measurement of the same run says goes first.
        let copy = bench["read_gigabytes_per_second"].as_f64();
        let copy = copy.or_else(|| kernels.map(|k| number(&k["copy_gigabytes_per_second"]))).unwrap_or(f64::NAN);
        let floor = 1e-6 * bytes / copy;
        let token = number(&bench["device_token_ms"]);
        let text = format!(
            "\n## Shape {}\n\n{:.2} billion parameters, {:.2} bits a quantized weight, compiled in {:.0} s. A token \
             reads {:.2} GB of weights: {floor:.3} ms at the speed of a copy; the device takes {token:.3} ms ({:.0} % of \
             that speed).",
            label(config),
            1e-9 * number(&shape["parameters"]),
            number(&shape["bits_per_weight"]),
            number(&shape["compile_seconds"]),
            1e-9 * bytes,
            100.0 * floor / token
        );
        line(out, &text);
        let same = |d: &&Json| d["config"].as_str() == Some(config);
        if let Some(other) = torch.and_then(|t| list(&t["decoders"]).iter().find(same)) {
            let ms = number(&other["milliseconds"]);
            let text = format!(
                "PyTorch's f16 linears alone, {:.2} GB, take {ms:.3} ms: {:.2} times as long.",
                1e-9 * number(&other["bytes"]),
                ms / token
            );
            line(out, &text);
        }
        out.push('\n');
        speeds(out, bench);
    }
}

/// The name of the folder that holds a configuration.
fn label(config: &str) -> &str {
    config.trim_end_matches("/config.json").rsplit('/').next().unwrap_or(config)
}

fn list(value: &Json) -> &[Json] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number(value: &Json) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ratios_stand_beside_each_other() {
        let found = json!({
            "machine": { "device": "A", "compute_capability": "9.0", "driver": "580" },
            "tests": { "failed": "one test" },
            "kernels": {
                "copy_gigabytes_per_second": 3000.0,
                "products": [{
                    "type": "u4g128", "rows": 64, "cols": 128, "tokens": 1, "microseconds": 2.0,
                    "gigabytes_per_second": 2400.0, "bandwidth_share": 0.8, "teraops": 1.5, "error": 1e-7,
                }],
            },
            "torch": {
                "torch": "2.6", "copy_gigabytes_per_second": 2900.0, "square_teraops": 700.0,
                "linears": [{ "rows": 64, "cols": 128, "tokens": 1, "microseconds": 7.0 }],
                "decoders": [{ "config": "/a/shape-c/config.json", "milliseconds": 4.0, "bytes": 12e9 }],
            },
            "calibration": {
                "host": { "profile_seconds": 40.0, "seconds": 90.0, "perplexity": 12.0 },
                "cuda": { "profile_seconds": 4.0, "seconds": 50.0, "perplexity": 12.01 },
            },
            "shapes": { "list": [{
                "config": "/a/shape-c/config.json", "parameters": 6.7e9, "bits_per_weight": 4.16, "compile_seconds": 60.0,
                "bench": {
                    "bytes_per_token": 3.6e9, "read_gigabytes_per_second": 3000.0, "device_token_ms": 1.6,
                    "tests": [{ "test": "pp512", "median": 100.0, "deviation": 1.0 }],
                },
            }] },
        });
        let text = markdown(found.as_object().unwrap());
        for part in [
            "# awqc on A",
            "## Shape shape-c\n",
            "**Step `tests` failed:** one test",
            "| u4g128 | 64 | 128 | 1 | 2.0 | 2400 | 80 | 1.50 | 1.0e-7 | 7.0 | 3.50 |",
            "1.200 ms at the speed of a copy; the device takes 1.600 ms (75 % of",
            "take 4.000 ms: 2.50 times as long.",
            "| pp512 | 100.0 | 1.0 |  |  |  |  |",
            "| device | 4.0 | 50.0 | 12.0100 |",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(!text.contains("NaN"), "{text}");
    }
}
