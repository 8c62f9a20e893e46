//! Kernels of row steps against the ops' formulas in f64.

use awqc_cuda::arch::Arch;
use awqc_cuda::driver::{Address, Buffer};
use awqc_cuda::emit::Source;
use awqc_cuda::kernels::Float;
use awqc_cuda::kernels::rows::{Kind, Map, NO_IMAGE, Out, Row, Rows, Step, Zip};
use half::bf16;

use crate::support::{Bench, Random, error, rounded};

const TOKENS: usize = 3;

fn row(arg: usize, pitch: usize) -> Row {
    Row { arg, pitch, col: 0 }
}

fn source(steps: Vec<Step>, args: Vec<Kind>) -> (Rows, Source) {
    let rows = Rows { steps, args };
    let source = rows.source(Arch::find(89).expect("an architecture")).expect("a kernel");
    (rows, source)
}

fn launch(bench: &Bench, (rows, source): &(Rows, Source), past: usize, args: &[&Buffer]) {
    let call = bench.call(TOKENS, past);
    let args: Vec<Address> = args.iter().map(|b| b.address()).chain([call.address()]).collect();
    bench.launch(source, [rows.blocks(), TOKENS as u32, 1], &args);
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn rms(row: &[f64], eps: f64) -> Vec<f64> {
    let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
    row.iter().map(|v| v / (mean + eps).sqrt()).collect()
}

#[test]
fn tables_of_every_float_type() {
    let (width, rows) = (600, 9);
    let types = [Float::F32, Float::F16, Float::Bf16];
    let step = |of| Step::Embed { table: 0, of, index: 1, offset: 2, width, out: Out::F32(row(2, width)) };
    let kernels = types.map(|of| source(vec![step(of)], vec![Kind::Table(of), Kind::Ints, Kind::F32]));
    let bench = Bench::new(kernels.iter().map(|k| &k.1));
    let table = Random::new(1).floats(rows * width);
    let ids = [4, 0, 6];
    for (of, kernel) in types.iter().zip(&kernels) {
        let (buffer, stored) = match of {
            Float::F32 => (bench.f32(&table), table.clone()),
            Float::F16 => (bench.f16(&table), rounded(&table)),
            Float::Bf16 => {
                let short: Vec<bf16> = table.iter().map(|v| bf16::from_f32(*v)).collect();
                let bytes: Vec<u8> = short.iter().flat_map(|v| v.to_le_bytes()).collect();
                (bench.bytes(&bytes), short.iter().map(|v| v.to_f32()).collect())
            }
        };
        let out = bench.f32(&vec![f32::NAN; TOKENS * width]);
        launch(&bench, kernel, 0, &[&buffer, &bench.u32(&ids), &out]);
        let want: Vec<f32> = ids.iter().flat_map(|i| stored[(*i as usize + 2) * width..][..width].to_vec()).collect();
        assert_eq!(bench.read_f32(&out), want, "{of:?}");
        assert_eq!(kernel.0.blocks(), 2, "a wide row is divided");
    }
}

#[test]
fn rows_of_images_stand_at_their_tokens() {
    let width = 600;
    let step = Step::Image { x: row(0, width), images: 1, index: 2, width, out: Out::F16(row(3, width)) };
    let kernel = source(vec![step], vec![Kind::F32, Kind::Parameter, Kind::Ints, Kind::F16]);
    let bench = Bench::new([&kernel.1]);
    let mut random = Random::new(2);
    let (x, images) = (random.floats(TOKENS * width), random.floats(5 * width));
    for places in [[4, NO_IMAGE, 0], [NO_IMAGE; 3]] {
        let out = bench.f16(&vec![f32::NAN; TOKENS * width]);
        launch(&bench, &kernel, 0, &[&bench.f32(&x), &bench.f32(&images), &bench.u32(&places), &out]);
        let from = |(t, place): (usize, &u32)| match *place {
            NO_IMAGE => &x[t * width..][..width],
            place => &images[place as usize * width..][..width],
        };
        let want: Vec<f32> = places.iter().enumerate().flat_map(from).copied().collect();
        assert_eq!(bench.read_f16(&out), rounded(&want), "{places:?}");
    }
    assert_eq!(kernel.0.blocks(), 2, "a wide row is divided");
}

#[test]
fn norms_of_rows_and_of_heads() {
    let (width, heads) = (520, 5);
    let add_norm = source(
        vec![
            Step::Zip {
                a: row(0, width),
                f: Map::Same,
                b: row(1, width),
                zip: Zip::Add,
                width,
                out: Out::F32(row(0, width)),
            },
            Step::RmsNorm { x: row(0, width), gain: Some(2), heads: 1, width, eps: 1e-2, out: Out::F16(row(3, width)) },
        ],
        vec![Kind::F32, Kind::F32, Kind::Parameter, Kind::F16],
    );
    let layer = source(
        vec![Step::LayerNorm {
            x: row(0, width),
            gain: Some(1),
            bias: Some(2),
            width,
            heads: 1,
            each: false,
            eps: 1e-2,
            out: Out::F32(row(3, width)),
        }],
        vec![Kind::F32, Kind::Parameter, Kind::Parameter, Kind::F32],
    );
    let bare = source(
        vec![Step::LayerNorm {
            x: row(0, width),
            gain: None,
            bias: None,
            width,
            heads: 1,
            each: false,
            eps: 1e-2,
            out: Out::F32(row(1, width)),
        }],
        vec![Kind::F32, Kind::F32],
    );
    let head = source(
        vec![Step::RmsNorm {
            x: row(0, width),
            gain: Some(1),
            heads,
            width: width / heads,
            eps: 1e-2,
            out: Out::F32(row(0, width)),
        }],
        vec![Kind::F32, Kind::Parameter],
    );
    assert_eq!(add_norm.0.blocks(), 1, "a norm needs its whole row");
    let bench = Bench::new([&add_norm.1, &layer.1, &bare.1, &head.1]);
    let mut random = Random::new(2);
    let (a, b) = (random.floats(TOKENS * width), random.floats(TOKENS * width));
    let (gain, bias) = (random.floats(width), random.floats(width));
    let (bg, bb) = (bench.f32(&gain), bench.f32(&bias));
    let (gain, bias) = (wide(&gain), wide(&bias));

    let (ba, out) = (bench.f32(&a), bench.f16(&vec![f32::NAN; TOKENS * width]));
    launch(&bench, &add_norm, 0, &[&ba, &bench.f32(&b), &bg, &out]);
    let sum: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f64::from(a + b)).collect();
    assert!(error(&bench.read_f32(&ba), &sum) < 1e-7);
    let want: Vec<f64> = sum
        .chunks(width)
        .flat_map(|r| rms(r, 1e-2).into_iter().zip(&gain).map(|(v, g)| v * g).collect::<Vec<_>>())
        .collect();
    assert!(error(&bench.read_f16(&out), &want) < 4e-4);

    let layer_of = |r: &[f64]| {
        let mean = r.iter().sum::<f64>() / width as f64;
        let moved: Vec<f64> = r.iter().map(|v| v - mean).collect();
        rms(&moved, 1e-2)
    };
    let out = bench.f32(&vec![f32::NAN; TOKENS * width]);
    launch(&bench, &layer, 0, &[&bench.f32(&a), &bg, &bb, &out]);
    let want: Vec<f64> = wide(&a)
        .chunks(width)
        .flat_map(|r| {
            layer_of(r).into_iter().zip(gain.iter().zip(&bias)).map(|(v, (g, b))| v * g + b).collect::<Vec<_>>()
        })
        .collect();
    assert!(error(&bench.read_f32(&out), &want) < 1e-6);
    launch(&bench, &bare, 0, &[&bench.f32(&a), &out]);
    let want: Vec<f64> = wide(&a).chunks(width).flat_map(layer_of).collect();
    assert!(error(&bench.read_f32(&out), &want) < 1e-6);

    let ba = bench.f32(&a);
    launch(&bench, &head, 0, &[&ba, &bg]);
    let want: Vec<f64> = wide(&a)
        .chunks(width / heads)
        .flat_map(|r| rms(r, 1e-2).into_iter().zip(&gain).map(|(v, g)| v * g).collect::<Vec<_>>())
        .collect();
    assert!(error(&bench.read_f32(&ba), &want) < 1e-6);
}

#[test]
fn rotations_and_the_cache() {
    // Columns 7.. of a wider row, heads of 10 columns of which 6 turn.
    let (pitch, heads, width, pairs, past) = (64, 3, 10, 3, 4);
    let rope = |interleaved, out| {
        let step = Step::Rope {
            x: Row { col: 7, ..row(0, pitch) },
            cos: row(1, 8),
            sin: row(2, 8),
            heads,
            width,
            pairs,
            interleaved,
            out,
        };
        let kind = if matches!(out, Out::Cache(_)) { Kind::F16 } else { Kind::F32 };
        source(vec![step], vec![Kind::F32, Kind::F32, Kind::F32, kind])
    };
    let kernels = [
        (false, Out::F32(row(3, heads * width))),
        (true, Out::F32(row(3, heads * width))),
        (false, Out::Cache(row(3, heads * width))),
    ]
    .map(|(interleaved, out)| (interleaved, rope(interleaved, out)));
    let bench = Bench::new(kernels.iter().map(|k| &k.1.1));
    let mut random = Random::new(3);
    let (x, cos, sin) = (random.floats(TOKENS * pitch), random.floats(TOKENS * 8), random.floats(TOKENS * 8));
    for (i, (interleaved, kernel)) in kernels.iter().enumerate() {
        let mut want: Vec<f64> = (0..TOKENS).flat_map(|t| wide(&x[t * pitch + 7..][..heads * width])).collect();
        for t in 0..TOKENS {
            for (h, j) in (0..heads).flat_map(|h| (0..pairs).map(move |j| (h, j))) {
                let at = (t * heads + h) * width;
                let (a, b) = if *interleaved { (at + 2 * j, at + 2 * j + 1) } else { (at + j, at + j + pairs) };
                let (c, s) = (f64::from(cos[t * 8 + j]), f64::from(sin[t * 8 + j]));
                let (u, v) = (want[a], want[b]);
                (want[a], want[b]) = (u * c - v * s, v * c + u * s);
            }
        }
        let positions = TOKENS + past + 1;
        let blank = vec![7.0; positions * heads * width];
        let out = if i == 2 { bench.f16(&blank) } else { bench.f32(&blank) };
        launch(&bench, kernel, past, &[&bench.f32(&x), &bench.f32(&cos), &bench.f32(&sin), &out]);
        if i == 2 {
            let cache = bench.read_f16(&out);
            let (before, rest) = cache.split_at(past * heads * width);
            let (new, after) = rest.split_at(TOKENS * heads * width);
            assert!(error(new, &want) < 5e-4);
            assert!(before.iter().chain(after).all(|v| *v == 7.0), "other positions change");
        } else {
            assert!(error(&bench.read_f32(&out)[..TOKENS * heads * width], &want) < 1e-6);
        }
    }
}

/// The error function by its series.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..80 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn apply(f: Map, x: f64) -> f64 {
    match f {
        Map::Same => x,
        Map::Silu => x / (1.0 + (-x).exp()),
        Map::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Map::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
        Map::GeluQuick => x / (1.0 + (-1.702 * x).exp()),
        Map::Relu => x.max(0.0),
        Map::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Map::Clamp(c) => x.clamp(-f64::from(c), f64::from(c)),
        Map::Scale(k) => x * f64::from(k),
        Map::Softcap(c) => f64::from(c) * (x / f64::from(c)).tanh(),
    }
}

#[test]
fn functions_of_one_and_of_two_numbers() {
    let width = 1100;
    let maps = [
        Map::Same,
        Map::Silu,
        Map::GeluErf,
        Map::GeluTanh,
        Map::GeluQuick,
        Map::Relu,
        Map::Scale(-2.5),
        Map::Sigmoid,
        Map::Clamp(0.75),
        Map::Softcap(1.5),
    ];
    let single: Vec<_> = maps
        .iter()
        .map(|f| {
            source(
                vec![Step::Map { x: row(0, width), f: *f, width, out: Out::F32(row(1, width)) }],
                vec![Kind::F32, Kind::F32],
            )
        })
        .collect();
    let zips: Vec<_> = [(Map::Silu, Zip::Mul, width), (Map::Same, Zip::Add, 0), (Map::GeluTanh, Zip::Mul, 0)]
        .map(|(f, zip, pitch)| {
            let kind = if pitch == 0 { Kind::Parameter } else { Kind::F32 };
            let step = Step::Zip { a: row(0, width), f, b: row(1, pitch), zip, width, out: Out::F16(row(2, width)) };
            (f, zip, pitch, source(vec![step], vec![Kind::F32, kind, Kind::F16]))
        })
        .into();
    let bench = Bench::new(single.iter().map(|k| &k.1).chain(zips.iter().map(|k| &k.3.1)));
    let mut random = Random::new(4);
    let x: Vec<f32> = random.floats(TOKENS * width).iter().map(|v| 4.0 * v).collect();
    let y = random.floats(TOKENS * width);
    for (f, kernel) in maps.iter().zip(&single) {
        let out = bench.f32(&vec![f32::NAN; x.len()]);
        launch(&bench, kernel, 0, &[&bench.f32(&x), &out]);
        let want: Vec<f64> = x.iter().map(|v| apply(*f, f64::from(*v))).collect();
        let error = error(&bench.read_f32(&out), &want);
        assert!(error < 5e-7, "{f:?}: {error}");
        assert_eq!(kernel.0.blocks(), 3);
    }
    for (f, zip, pitch, kernel) in &zips {
        let out = bench.f16(&vec![f32::NAN; x.len()]);
        launch(&bench, kernel, 0, &[&bench.f32(&x), &bench.f32(&y), &out]);
        let want: Vec<f64> = (0..x.len())
            .map(|i| {
                let (a, b) = (apply(*f, f64::from(x[i])), f64::from(y[i / width * pitch + i % width]));
                if *zip == Zip::Add { a + b } else { a * b }
            })
            .collect();
        assert!(error(&bench.read_f16(&out), &want) < 5e-4, "{f:?} {zip:?}");
    }
}

/// Large numbers overflow in none of the functions.
#[test]
fn functions_saturate() {
    let maps = [Map::Silu, Map::GeluErf, Map::GeluTanh, Map::GeluQuick, Map::Softcap(30.0)];
    let kernels: Vec<_> = maps
        .iter()
        .map(|f| {
            source(
                vec![Step::Map { x: row(0, 2), f: *f, width: 2, out: Out::F32(row(1, 2)) }],
                vec![Kind::F32, Kind::F32],
            )
        })
        .collect();
    let bench = Bench::new(kernels.iter().map(|k| &k.1));
    for (f, kernel) in maps.iter().zip(&kernels) {
        let out = bench.f32(&[f32::NAN; 2 * TOKENS]);
        launch(&bench, kernel, 0, &[&bench.f32(&[1e4, -1e4].repeat(TOKENS)), &out]);
        let want = if let Map::Softcap(c) = f { [*c, -c] } else { [1e4, 0.0] };
        assert_eq!(bench.read_f32(&out)[..2], want, "{f:?}");
    }
}
