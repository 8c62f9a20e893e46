//! Images on their way into a model: read, brought to the size and the range of numbers that the checkpoint's
//! `preprocessor_config.json` asks for, and given their places in the prompt.

use std::path::{Path, PathBuf};

use awqc_ir::Images;
use awqc_passes::Tensor;
use awqc_passes::remark::counted;
use image::imageops::{FilterType, resize};
use image::{ImageReader, Rgb, RgbImage};
use serde_json::Value as Json;

use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::tokens::Tokenizer;

/// The file that says how images are prepared.
const CONFIG: &str = "preprocessor_config.json";
/// What stands for an image in a prompt.
pub const MARK: &str = "<image>";
/// Most bytes that decoding an image may take.
const LIMIT: u64 = 1 << 29;
/// Most pixels that an image may have when it is prepared: long and narrow ones grow when they are resized.
const PIXELS: u64 = 1 << 26;

/// How images are prepared.
#[derive(Clone, Debug, PartialEq)]
pub struct Preparation {
    /// Whether an image is first made a square, with this background.
    square: Option<Rgb<u8>>,
    size: Option<Size>,
    filter: FilterType,
    /// Lines and columns that are cut out of the middle.
    crop: Option<(u32, u32)>,
    /// A number from 0 to 255 is multiplied by this, …
    rescale: f32,
    /// … this is taken off, and the rest divided by the last, for each colour.
    mean: [f32; 3],
    deviation: [f32; 3],
}

/// What an image is resized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// The shorter side gets this length, the other one follows.
    Shortest(u32),
    /// Lines and columns.
    Exactly(u32, u32),
}

fn bad(key: &str, problem: &str) -> Failure {
    Failure::new(Exit::BadInput, format!("{CONFIG}: `{key}` {problem}"))
}

/// A length that an image can have.
fn side(key: &str, value: &Json) -> Result<u32, Failure> {
    let fits = value.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=1 << 14).contains(n));
    fits.ok_or_else(|| bad(key, &format!("is {value}; a number of pixels is needed")))
}

/// A number that says whether a step is done; `otherwise` if nothing says so.
fn flag(config: &Json, key: &str, otherwise: bool) -> Result<bool, Failure> {
    match config.get(key) {
        None | Some(Json::Null) => Ok(otherwise),
        Some(Json::Bool(on)) => Ok(*on),
        Some(other) => Err(bad(key, &format!("is {other}; true or false is needed"))),
    }
}

/// One number for each colour.
fn colours(config: &Json, key: &str) -> Result<[f32; 3], Failure> {
    let wrong = || bad(key, "must be three numbers, one for each colour");
    let list = config.get(key).and_then(Json::as_array).ok_or_else(wrong)?;
    let numbers: Option<Vec<f32>> = list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect();
    numbers.and_then(|n| <[f32; 3]>::try_from(n).ok()).filter(|n| n.iter().all(|v| v.is_finite())).ok_or_else(wrong)
}

/// Lines and columns, as a number or an object has them.
fn rectangle(key: &str, value: &Json) -> Result<(u32, u32), Failure> {
    match (value.get("height"), value.get("width")) {
        (Some(h), Some(w)) => Ok((side(key, h)?, side(key, w)?)),
        (None, None) if value.is_u64() => Ok((side(key, value)?, side(key, value)?)),
        (Some(_) | None, Some(_) | None) => Err(bad(key, &format!("is {value}; `height` and `width` are needed"))),
    }
}

impl Preparation {
    /// Reads the settings that Hugging Face image processors share.
    ///
    /// # Errors
    /// When a value is missing, of the wrong kind, or not known.
    pub fn of(config: &Json) -> Result<Self, Failure> {
        let size = match config.get("size") {
            _ if !flag(config, "do_resize", true)? => None,
            None | Some(Json::Null) => return Err(bad("size", "is missing: it says what images are resized to")),
            Some(size) => Some(match size.get("shortest_edge") {
                Some(edge) => Size::Shortest(side("size", edge)?),
                None if size.is_u64() => Size::Shortest(side("size", size)?),
                None => {
                    let (h, w) = rectangle("size", size)?;
                    Size::Exactly(h, w)
                }
            }),
        };
        // The numbers of Pillow's filters.
        let filter = match config.get("resample").unwrap_or(&Json::Null) {
            Json::Null => FilterType::CatmullRom,
            value => match value.as_u64() {
                Some(0) => FilterType::Nearest,
                Some(1) => FilterType::Lanczos3,
                Some(2) => FilterType::Triangle,
                Some(3) => FilterType::CatmullRom,
                Some(_) | None => return Err(bad("resample", &format!("is {value}; 0, 1, 2 and 3 are known"))),
            },
        };
        let crop = config.get("crop_size").filter(|c| !c.is_null());
        let crop = if flag(config, "do_center_crop", crop.is_some())? {
            let given = crop.ok_or_else(|| bad("crop_size", "is missing: it says what is cut out"))?;
            Some(rectangle("crop_size", given)?)
        } else {
            None
        };
        let rescale = match config.get("rescale_factor") {
            _ if !flag(config, "do_rescale", true)? => 1.0,
            None | Some(Json::Null) => 1.0 / 255.0,
            Some(value) => {
                value.as_f64().filter(|v| v.is_finite()).ok_or_else(|| bad("rescale_factor", "must be a number"))?
                    as f32
            }
        };
        let (mean, deviation) = if flag(config, "do_normalize", true)? {
            (colours(config, "image_mean")?, colours(config, "image_std")?)
        } else {
            ([0.0; 3], [1.0; 3])
        };
        if deviation.contains(&0.0) {
            return Err(bad("image_std", "holds 0, by which nothing can be divided"));
        }
        Ok(Self { square: None, size, filter, crop, rescale, mean, deviation })
    }

    /// As a model's files say.
    ///
    /// # Errors
    /// When the file is missing or wrong.
    pub fn of_model(model: &Model) -> Result<Self, Failure> {
        let config = model.json(CONFIG)?.ok_or_else(|| {
            Failure::new(Exit::BadInput, format!("the model has no {CONFIG}, which says how images are prepared"))
                .help("copy it from where the model came from into the model's folder")
        })?;
        let mut own = Self::of(&config)?;
        match model.config.get("image_aspect_ratio").and_then(Json::as_str) {
            None | Some("resize") => {}
            Some("pad") => own.square = Some(Rgb(own.mean.map(|m| (m * 255.0) as u8))),
            Some(other) => {
                let message =
                    format!("the model's configuration has image_aspect_ratio={other}; resize and pad are known");
                return Err(Failure::new(Exit::Unsupported, message));
            }
        }
        Ok(own)
    }

    /// One image as numbers, `[3,H,W]`, and its lines and columns.
    ///
    /// # Errors
    /// When it would grow out of all bounds.
    pub fn prepare(&self, image: &RgbImage) -> Result<(Vec<f32>, u32, u32), Failure> {
        let (w, h) = image.dimensions();
        let area = |h: u32, w: u32| u64::from(h) * u64::from(w);
        let too_large = || {
            let message = format!("an image of {w} times {h} pixels is too long and narrow to be resized");
            Err(Failure::new(Exit::BadInput, message).help("cut out the part that matters"))
        };
        if self.square.is_some() && area(w.max(h), w.max(h)) > PIXELS {
            return too_large();
        }
        let mut image = match self.square {
            Some(background) => square(image, background),
            None => image.clone(),
        };
        let (w, h) = image.dimensions();
        let wanted = match self.size {
            None => (h, w),
            Some(Size::Exactly(h, w)) => (h, w),
            // The longer side is rounded down, as Python's `int` does.
            Some(Size::Shortest(n)) if h <= w => (n, (u64::from(n) * u64::from(w) / u64::from(h.max(1))) as u32),
            Some(Size::Shortest(n)) => ((u64::from(n) * u64::from(h) / u64::from(w.max(1))) as u32, n),
        };
        if area(wanted.0, wanted.1) > PIXELS {
            return too_large();
        }
        if wanted != (h, w) {
            image = resize(&image, wanted.1, wanted.0, self.filter);
        }
        let (w, h) = image.dimensions();
        let (lines, columns) = self.crop.unwrap_or((h, w));
        // Where the image is smaller than what is cut out of it, there is black around it.
        let offset = |have: u32, want: u32| (i64::from(have) - i64::from(want)).div_euclid(2);
        let (top, left) = (offset(h, lines), offset(w, columns));
        let mut out = Vec::with_capacity(3 * lines as usize * columns as usize);
        for colour in 0..3 {
            for y in 0..i64::from(lines) {
                for x in 0..i64::from(columns) {
                    let at = |n: i64, from: i64| u32::try_from(n + from).unwrap_or(u32::MAX);
                    let pixel = image.get_pixel_checked(at(x, left), at(y, top)).map_or(0, |p| p.0[colour]);
                    out.push((f32::from(pixel) * self.rescale - self.mean[colour]) / self.deviation[colour]);
                }
            }
        }
        Ok((out, lines, columns))
    }
}

/// The image in the middle of a square.
fn square(image: &RgbImage, background: Rgb<u8>) -> RgbImage {
    let (w, h) = image.dimensions();
    let side = w.max(h);
    let mut out = RgbImage::from_pixel(side, side, background);
    image::imageops::replace(&mut out, image, i64::from((side - w) / 2), i64::from((side - h) / 2));
    out
}

fn read(path: &Path) -> Result<RgbImage, Failure> {
    let unreadable = |e: &dyn std::fmt::Display| {
        Failure::new(Exit::BadInput, format!("{}: not an image that can be read: {e}", path.display()))
            .help("PNG and JPEG are known")
    };
    let mut reader =
        ImageReader::open(path).and_then(ImageReader::with_guessed_format).map_err(|e| Failure::io(path, &e))?;
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(LIMIT);
    reader.limits(limits);
    Ok(reader.decode().map_err(|e| unreadable(&e))?.to_rgb8())
}

/// The images in these files as a model takes them, `[N,3,H,W]`.
///
/// # Errors
/// When a file is no image, or the checkpoint prepares images otherwise than it takes them.
pub fn pixels(model: &Model, images: &Images, paths: &[PathBuf]) -> Result<Tensor, Failure> {
    if images.channels != 3 {
        let message = format!("the model takes images of {} colours; only 3 are known", images.channels);
        return Err(Failure::new(Exit::Unsupported, message));
    }
    let preparation = Preparation::of_model(model)?;
    let mut data = Vec::new();
    for path in paths {
        let (numbers, lines, columns) = preparation.prepare(&read(path)?)?;
        if (u64::from(lines), u64::from(columns)) != (images.height, images.width) {
            return Err(Failure::new(
                Exit::BadInput,
                format!(
                    "{CONFIG} makes images of {lines} times {columns} pixels, the model takes {} times {}: are both of one model?",
                    images.height, images.width
                ),
            ));
        }
        data.extend(numbers);
    }
    Ok(Tensor { shape: vec![paths.len(), 3, images.height as usize, images.width as usize], data })
}

/// The prompt with `count` images at its beginning, if it does not say where they stand.
pub fn marked(prompt: &str, count: usize) -> String {
    match prompt.contains(MARK) {
        true => prompt.to_owned(),
        false => format!("{}{prompt}", format!("{MARK}\n").repeat(count)),
    }
}

/// The ids of a prompt with `count` images where `<image>` stands; at its beginning if it stands nowhere.
///
/// # Errors
/// When there are more or fewer places than images, or the tokenizer refuses the text.
pub fn encode(tokenizer: &Tokenizer, prompt: &str, images: &Images, count: usize) -> Result<Vec<i32>, Failure> {
    let prompt = marked(prompt, count);
    let places = prompt.matches(MARK).count();
    if places != count {
        let places = counted(places as u64, "place");
        let message = format!("the prompt has {places} for images ({MARK}), images given: {count}");
        return Err(Failure::new(Exit::Usage, message).help("give one --image for each place, or no place at all"));
    }
    let token = images
        .token
        .and_then(|t| i32::try_from(t).ok())
        .ok_or_else(|| Failure::new(Exit::Unsupported, "the model takes images, but looks for none in its text"))?;
    let mut ids = Vec::new();
    for (i, text) in prompt.split(MARK).enumerate() {
        if i > 0 {
            ids.extend(std::iter::repeat_n(token, images.tokens as usize));
        }
        if !text.is_empty() {
            ids.extend(tokenizer.encode(text)?);
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn clip() -> Json {
        json!({"size": {"shortest_edge": 4}, "crop_size": {"height": 4, "width": 4}, "resample": 3,
               "image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.5, 2.0]})
    }

    #[test]
    fn the_middle_of_an_image_becomes_numbers() {
        // Six columns, the first and last of which are cut off; no resizing is needed.
        let image =
            RgbImage::from_fn(6, 4, |x, y| Rgb([if (1..5).contains(&x) { 255 } else { 7 }, (y * 10) as u8, 51]));
        let (numbers, lines, columns) = Preparation::of(&clip()).expect("settings").prepare(&image).expect("numbers");
        assert_eq!((lines, columns, numbers.len()), (4, 4, 48));
        assert!(numbers[..16].iter().all(|v| (v - 1.0).abs() < 1e-6), "{numbers:?}");
        assert!((numbers[16 + 4] - (10.0 / 255.0 - 0.25) / 0.5).abs() < 1e-6);
        assert!(numbers[32..].iter().all(|v| (v - 0.1).abs() < 1e-6));
    }

    #[test]
    fn the_shorter_side_is_resized_and_squares_are_padded() {
        let image = RgbImage::from_pixel(20, 8, Rgb([100, 100, 100]));
        let settings = Preparation::of(
            &json!({"size": {"shortest_edge": 4}, "do_center_crop": false, "do_normalize": false, "do_rescale": false}),
        )
        .expect("settings");
        let (numbers, lines, columns) = settings.prepare(&image).expect("numbers");
        assert_eq!((lines, columns), (4, 10));
        assert!(numbers.iter().all(|v| *v == 100.0));
        let padded = Preparation { square: Some(Rgb([1, 2, 3])), ..settings };
        let (numbers, lines, columns) = padded.prepare(&RgbImage::from_pixel(4, 2, Rgb([9, 9, 9]))).expect("numbers");
        assert_eq!((lines, columns), (4, 4));
        assert!((numbers[0] - 1.0).abs() < 1e-6 && (numbers[5] - 9.0).abs() < 1e-6, "{numbers:?}");
        // A line of pixels would become four lines of eighty million.
        let line = RgbImage::new(20_000_000, 1);
        let e = Preparation { square: None, ..padded }.prepare(&line).expect_err("too large");
        assert!(e.message.contains("too long and narrow"), "{e}");
    }

    #[test]
    fn settings_that_are_not_known_are_named() {
        for (key, value) in [
            ("size", json!("large")),
            ("size", Json::Null),
            ("crop_size", json!({"height": 4})),
            ("resample", json!(9)),
            ("image_mean", json!([1.0])),
            ("image_std", json!([0.0, 1.0, 1.0])),
            ("do_rescale", json!("yes")),
            ("rescale_factor", json!("1/255")),
        ] {
            let mut config = clip();
            config[key] = value;
            let e = Preparation::of(&config).expect_err(key);
            assert!(e.message.contains(&format!("`{key}`")), "{e}");
        }
    }
}
