//! Tokenizer files made from GGUF metadata: a complete `tokenizer.json` for byte-level BPE and for SentencePiece
//! vocabularies, with the configuration files that go with it. What the names in the metadata stand for is a table,
//! `tokenizers.json`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::reader::{Header, Strings, Value};
use crate::error::ImportError;
use crate::open::{Contents, ExtraFile};

/// What a token is, as `tokenizer.ggml.token_type` says.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    /// Also the token for what is unknown.
    Control,
    UserDefined,
    Byte,
}

struct Vocabulary<'a> {
    tokens: &'a Strings,
    kinds: Vec<Kind>,
    header: &'a Header,
}

/// Makes the tokenizer files. Token ids that models need (`bos_token_id`, …) go to `config`. A tokenizer that cannot be
/// reproduced is left out, with a note.
pub(super) fn synthesise(
    path: &Path,
    header: &Header,
    config: &mut Map<String, Json>,
    notes: &mut Vec<String>,
) -> Result<Vec<ExtraFile>, ImportError> {
    let (Some(Value::Str(model)), Some(Value::Strs(tokens))) =
        (header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.tokens"))
    else {
        notes.push(format!("{} holds no tokenizer", path.display()));
        return Ok(Vec::new());
    };
    let kinds = kinds(path, header, tokens.len())?;
    let v = Vocabulary { tokens, kinds, header };
    let known = Known::load()?;
    let pre = v.text("tokenizer.ggml.pre").unwrap_or("default");
    let (kind, scheme) = (known.models.get(model).copied(), known.scheme(pre));
    let usual = match kind {
        Some(Model::SentencePiece) => true,
        Some(Model::ByteLevel) | None => scheme.is_some_and(|s| s.add_bos),
    };
    let special = v.special_tokens(path, config, usual)?;
    let tokenizer = match (kind, scheme) {
        (Some(Model::ByteLevel), Some(scheme)) => Some(v.byte_level(path, &special, scheme, &known.splits)?),
        (Some(Model::SentencePiece), _) => Some(v.sentence_piece(path, &special)?),
        (Some(Model::ByteLevel), None) | (None, _) => None,
    };
    let Some(tokenizer) = tokenizer else {
        notes.push(format!(
            "{}: the tokenizer `{model}` with pre-tokenizer `{pre}` is not known; no tokenizer.json is made",
            path.display()
        ));
        return Ok(Vec::new());
    };
    let mut settings = Map::new();
    for (role, content) in &special.names {
        settings.insert(format!("{role}_token"), content.clone().into());
    }
    let map = settings.clone();
    settings.insert("add_bos_token".into(), special.add_bos.into());
    settings.insert("add_eos_token".into(), special.add_eos.into());
    settings.insert("clean_up_tokenization_spaces".into(), false.into());
    if let Some(length) = config.get("max_position_embeddings") {
        settings.insert("model_max_length".into(), length.clone());
    }
    settings.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    if let Some(template) = v.text("tokenizer.chat_template") {
        settings.insert("chat_template".into(), template.into());
    }
    Ok(vec![
        file("tokenizer.json", &tokenizer),
        file("tokenizer_config.json", &Json::Object(settings)),
        file("special_tokens_map.json", &Json::Object(map)),
        file("generation_config.json", &v.generation(config)),
    ])
}

fn file(name: &str, json: &Json) -> ExtraFile {
    // A `Value` always serialises: its keys are strings.
    ExtraFile { name: name.to_owned(), contents: Contents::Bytes(format!("{json:#}\n").into_bytes()) }
}

fn kinds(path: &Path, header: &Header, tokens: usize) -> Result<Vec<Kind>, ImportError> {
    let key = "tokenizer.ggml.token_type";
    let kinds: Vec<Kind> = match header.metadata.get(key) {
        None => vec![Kind::Plain; tokens],
        Some(Value::Ints(kinds)) => kinds
            .iter()
            .map(|k| match k {
                2 | 3 => Kind::Control,
                4 => Kind::UserDefined,
                6 => Kind::Byte,
                _other => Kind::Plain,
            })
            .collect(),
        Some(_) => return Err(ImportError::config(path, key, "must be an array of integers")),
    };
    if kinds.len() == tokens {
        Ok(kinds)
    } else {
        Err(ImportError::config(path, key, format!("has {} entries for {tokens} tokens", kinds.len())))
    }
}

/// The tokens with a role.
struct Special {
    names: Vec<(&'static str, String)>,
    bos: Option<(u64, String)>,
    eos: Option<(u64, String)>,
    unk: Option<String>,
    add_bos: bool,
    add_eos: bool,
}

impl Vocabulary<'_> {
    fn text(&self, key: &str) -> Option<&str> {
        match self.header.metadata.get(key) {
            Some(Value::Str(s)) => Some(s),
            Some(_) | None => None,
        }
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.header.metadata.get(key) {
            Some(Value::Bool(b)) => Some(*b),
            Some(_) | None => None,
        }
    }

    fn id(&self, path: &Path, role: &str) -> Result<Option<(u64, String)>, ImportError> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        match self.header.metadata.get(&key) {
            None => Ok(None),
            // All ones mean that there is none.
            Some(Value::U64(id)) if *id == u64::from(u32::MAX) => Ok(None),
            Some(Value::U64(id)) => match usize::try_from(*id).ok().and_then(|i| self.tokens.get(i)) {
                Some(token) => Ok(Some((*id, token.to_owned()))),
                None => Err(ImportError::config(path, key, format!("is {id}; there are {} tokens", self.tokens.len()))),
            },
            Some(Value::I64(id)) if *id < 0 => Ok(None),
            Some(other) => Err(ImportError::config(path, key, format!("is {other:?}; a token id is needed"))),
        }
    }

    /// `usual` says whether vocabularies of this kind begin a text with bos where the file does not say.
    fn special_tokens(&self, path: &Path, config: &mut Map<String, Json>, usual: bool) -> Result<Special, ImportError> {
        let (bos, eos) = (self.id(path, "bos")?, self.id(path, "eos")?);
        let (unk, pad) = (self.id(path, "unknown")?, self.id(path, "padding")?);
        let mut names = Vec::new();
        for (role, token) in [("bos", &bos), ("eos", &eos), ("unk", &unk), ("pad", &pad)] {
            if let Some((id, content)) = token {
                names.push((role, content.clone()));
                if role != "unk" {
                    config.insert(format!("{role}_token_id"), (*id).into());
                }
            }
        }
        let add_bos = self.flag("tokenizer.ggml.add_bos_token").unwrap_or(usual) && bos.is_some();
        let add_eos = self.flag("tokenizer.ggml.add_eos_token").unwrap_or(false) && eos.is_some();
        Ok(Special { names, bos, eos, unk: unk.map(|(_, content)| content), add_bos, add_eos })
    }

    /// `generation_config.json`: the end of a turn ends the text, too.
    fn generation(&self, config: &Map<String, Json>) -> Json {
        let mut out = Map::new();
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            if let Some(id) = config.get(key) {
                out.insert(key.into(), id.clone());
            }
        }
        if let (Some(Value::U64(eot)), Some(eos)) =
            (self.header.metadata.get("tokenizer.ggml.eot_token_id"), config.get("eos_token_id"))
            && eos.as_u64() != Some(*eot)
        {
            out.insert("eos_token_id".into(), json!([eos, eot]));
        }
        Json::Object(out)
    }

    /// Token to id; of equal tokens the first counts.
    fn vocab(&self) -> Map<String, Json> {
        let mut out = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            out.entry(token).or_insert(id.into());
        }
        out
    }

    /// Control tokens, and tokens that users added, are cut out of a text before anything else: as they are written,
    /// so that a space that the normalizer puts before a piece of text does not hide them. Runs of spaces, which some
    /// vocabularies count among these, are left to the merges, which make them from normalized text.
    fn added_tokens(&self) -> Json {
        let added = self
            .tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(|(_, (_, k))| matches!(k, Kind::Control | Kind::UserDefined));
        let entry = |(id, (content, kind)): (usize, (&str, &Kind))| {
            let special = *kind == Kind::Control;
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special})
        };
        Json::Array(added.filter(|(_, (t, _))| !t.is_empty() && !t.contains('▁')).map(entry).collect())
    }

    /// The post-processor that puts bos and eos around a text.
    fn template(special: &Special) -> Option<Json> {
        let piece = |t: &(u64, String), ty: u8| json!({"SpecialToken": {"id": t.1, "type_id": ty}});
        let bos = special.bos.as_ref().filter(|_| special.add_bos);
        let eos = special.eos.as_ref().filter(|_| special.add_eos);
        if bos.is_none() && eos.is_none() {
            return None;
        }
        let around = |id: &str, ty: u8| -> Vec<Json> {
            let sequence = json!({"Sequence": {"id": id, "type_id": ty}});
            bos.map(|t| piece(t, ty)).into_iter().chain([sequence]).chain(eos.map(|t| piece(t, ty))).collect()
        };
        let single = around("A", 0);
        let pair: Vec<Json> = single.iter().cloned().chain(around("B", 1)).collect();
        let tokens: Map<String, Json> = bos
            .into_iter()
            .chain(eos)
            .map(|(id, content)| (content.clone(), json!({"id": content, "ids": [id], "tokens": [content]})))
            .collect();
        Some(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}))
    }

    fn byte_level(
        &self,
        path: &Path,
        special: &Special,
        scheme: &Scheme,
        splits: &BTreeMap<String, String>,
    ) -> Result<Json, ImportError> {
        let key = "tokenizer.ggml.merges";
        let Some(Value::Strs(merges)) = self.header.metadata.get(key) else {
            return Err(ImportError::config(path, key, "must be an array of strings"));
        };
        if let Some(bad) = merges.iter().find(|m| m.split(' ').filter(|p| !p.is_empty()).count() != 2) {
            return Err(ImportError::config(
                path,
                key,
                format!("holds {bad:?}, which is not two tokens with a space between"),
            ));
        }
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let post = match Self::template(special) {
            Some(template) => json!({"type": "Sequence", "processors": [byte_level, template]}),
            None => byte_level.clone(),
        };
        let split = |regex: &String| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let steps = scheme.splits.iter().filter_map(|name| splits.get(name)).map(split);
        let steps: Vec<Json> = steps.chain([byte_level.clone()]).collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": if scheme.nfc { json!({"type": "NFC"}) } else { Json::Null },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": post,
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "ignore_merges": scheme.whole_words,
                "vocab": self.vocab(), "merges": merges.iter().collect::<Vec<_>>(),
            },
        }))
    }

    fn sentence_piece(&self, path: &Path, special: &Special) -> Result<Json, ImportError> {
        let key = "tokenizer.ggml.scores";
        let scores = match self.header.metadata.get(key) {
            Some(Value::Floats(s)) if s.len() == self.tokens.len() => s,
            Some(_) | None => {
                return Err(ImportError::config(path, key, format!("must be {} floats", self.tokens.len())));
            }
        };
        let prefix = self.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let normalizer = if prefix {
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]})
        } else {
            replace
        };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = special.unk.clone().or_else(|| self.tokens.get(0).map(str::to_owned));
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added_tokens(),
            "normalizer": normalizer,
            "pre_tokenizer": null,
            "post_processor": Self::template(special),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": self.kinds.contains(&Kind::Byte), "ignore_merges": false,
                "vocab": self.vocab(), "merges": self.merges(scores),
            },
        }))
    }

    /// The merges that a scored vocabulary implies: every way to put a token together from two others, the better
    /// scores first; SentencePiece always joins the pair whose result scores best.
    fn merges(&self, scores: &[f32]) -> Vec<Json> {
        let mut ids: HashMap<&str, usize> = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(token).or_insert(id);
        }
        let mut merges: Vec<(f32, usize, usize, usize)> = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            if matches!(kind, Kind::Control | Kind::Byte) {
                continue;
            }
            let score = scores.get(id).copied().unwrap_or(f32::MIN);
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                    merges.push((score, id, *l, *r));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        let token = |id: usize| self.tokens.get(id).unwrap_or("");
        // Pairs with a space inside can only be written as two strings.
        let spaces = merges.iter().any(|(_, id, ..)| token(*id).contains(' '));
        let write = |(_, _, l, r): (f32, usize, usize, usize)| {
            if spaces { json!([token(l), token(r)]) } else { format!("{} {}", token(l), token(r)).into() }
        };
        merges.into_iter().map(write).collect()
    }
}

/// How a text is cut into words before BPE, and the kinds of vocabularies.
#[derive(Deserialize)]
struct Known {
    /// By `tokenizer.ggml.model`.
    models: BTreeMap<String, Model>,
    /// Regular expressions with a name.
    splits: BTreeMap<String, String>,
    schemes: Vec<Scheme>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Model {
    ByteLevel,
    SentencePiece,
}

/// A way to cut words.
#[derive(Clone, Deserialize)]
struct Scheme {
    /// The values of `tokenizer.ggml.pre` that it stands for.
    names: Vec<String>,
    /// Names of the regular expressions that cut, one after the other.
    splits: Vec<String>,
    /// Whether the text is put into normal form C first.
    #[serde(default)]
    nfc: bool,
    /// Whether words that are tokens are taken whole, without merging.
    #[serde(default)]
    whole_words: bool,
    /// Whether every text begins with bos unless the file says otherwise.
    #[serde(default)]
    add_bos: bool,
}

impl Known {
    /// The table beside this file.
    fn load() -> Result<Self, ImportError> {
        let text = include_str!("tokenizers.json");
        serde_json::from_str(text).map_err(|e| ImportError::malformed(Path::new("tokenizers.json"), e.to_string()))
    }

    fn scheme(&self, name: &str) -> Option<&Scheme> {
        self.schemes.iter().find(|s| s.names.iter().any(|n| n == name))
    }
}
