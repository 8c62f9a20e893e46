//! The registry: which passes there are. A value, built by a visible list; nothing registers itself.

use std::sync::Arc;

use awqc_ir::Region;
use serde_json::{Map, Value as Json};

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::pipeline::{Pipeline, PipelineError, nearest};
use crate::rewrite::{Rule, RulesPass};
use crate::scheme::Scheme;

/// A pass whose type is forgotten: what the manager runs.
pub trait DynPass: Send + Sync {
    /// The name in pipelines.
    fn name(&self) -> &str;

    /// How exactly it preserves the function.
    fn fidelity(&self) -> Fidelity;

    /// See [`Pass::scheme`].
    fn scheme(&self) -> Option<Scheme>;

    /// See [`Pass::run`].
    ///
    /// # Errors
    /// As [`Pass::run`].
    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError>;
}

impl<P: Pass + Send + Sync> DynPass for P {
    fn name(&self) -> &str {
        P::NAME
    }

    fn fidelity(&self) -> Fidelity {
        P::fidelity()
    }

    fn scheme(&self) -> Option<Scheme> {
        Pass::scheme(self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        Pass::run(self, region, cx)
    }
}

type Make = dyn Fn(Json) -> Result<Box<dyn DynPass>, MakeError> + Send + Sync;

/// Why a pass could not be made from its options.
enum MakeError {
    /// An option is of the wrong kind or out of range.
    Option(String),
    /// The options contradict each other.
    Pass(PassError),
}

/// What is known of a registered pass: the source of `awqc passes` and of `docs/passes.md`.
#[derive(Clone)]
pub struct PassInfo {
    /// The name in pipelines.
    pub name: String,
    /// The page of documentation.
    pub doc: String,
    /// Every option with its default.
    pub options: Map<String, Json>,
    /// How exactly it preserves the function.
    pub fidelity: Fidelity,
    make: Arc<Make>,
}

/// The passes that pipelines may name.
#[derive(Clone, Default)]
pub struct Registry {
    passes: Vec<PassInfo>,
}

impl Registry {
    /// No passes.
    pub fn empty() -> Self {
        Self::default()
    }

    /// With one more pass. It replaces an earlier one of the same name.
    #[must_use]
    pub fn with<P: Pass + Send + Sync + 'static>(self) -> Self {
        let default = serde_json::to_value(P::Options::default());
        let (options, none) = match default {
            Ok(Json::Object(map)) => (map, false),
            // `()`: no options, and none in the JSON either.
            Ok(Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) | Json::Array(_)) | Err(_) => {
                (Map::new(), true)
            }
        };
        let make = move |options: Json| {
            let options = if none { Json::Null } else { options };
            let options = serde_json::from_value(options).map_err(|e| MakeError::Option(e.to_string()))?;
            let pass = P::new(options).map_err(MakeError::Pass)?;
            Ok(Box::new(pass) as Box<dyn DynPass>)
        };
        self.add(PassInfo {
            name: P::NAME.to_owned(),
            doc: P::DOC.to_owned(),
            options,
            fidelity: P::fidelity(),
            make: Arc::new(make),
        })
    }

    /// With a pass `name` that applies `rules`, such as the rules of a user's file.
    #[must_use]
    pub fn with_rewrites(self, name: impl Into<String>, rules: Vec<Rule>) -> Self {
        let pass = RulesPass::new(name.into(), rules);
        self.add(PassInfo {
            name: pass.name().to_owned(),
            doc: pass.doc(),
            options: Map::new(),
            fidelity: DynPass::fidelity(&pass),
            make: Arc::new(move |_| Ok(Box::new(pass.clone()))),
        })
    }

    fn add(mut self, pass: PassInfo) -> Self {
        match self.passes.iter_mut().find(|p| p.name == pass.name) {
            Some(old) => *old = pass,
            None => self.passes.push(pass),
        }
        self
    }

    /// The passes, in the order in which they were added.
    pub fn passes(&self) -> &[PassInfo] {
        &self.passes
    }

    /// The pass of this name.
    pub fn get(&self, name: &str) -> Option<&PassInfo> {
        self.passes.iter().find(|p| p.name == name)
    }

    /// The passes of a pipeline, ready to run.
    ///
    /// # Errors
    /// When a pass or an option does not exist, or an option does not fit. The error points into the pipeline.
    pub fn resolve(&self, pipeline: &Pipeline) -> Result<Vec<Box<dyn DynPass>>, PipelineError> {
        (0..pipeline.steps.len()).map(|step| self.resolve_step(pipeline, step)).collect()
    }

    fn resolve_step(&self, pipeline: &Pipeline, step: usize) -> Result<Box<dyn DynPass>, PipelineError> {
        let given = &pipeline.steps[step];
        let Some(pass) = self.get(&given.name) else {
            let names: Vec<&str> = self.passes.iter().map(|p| p.name.as_str()).collect();
            let message = format!("there is no pass `{}`", given.name);
            return Err(pipeline.error(step, None, message, Some(suggestion(&given.name, &names, "passes"))));
        };
        let known: Vec<&str> = pass.options.keys().map(String::as_str).collect();
        if let Some(key) = given.options.keys().find(|k| !pass.options.contains_key(*k)) {
            let message = format!("`{}` has no option `{key}`", pass.name);
            return Err(pipeline.error(step, Some(key), message, Some(suggestion(key, &known, "options"))));
        }
        let with = |set: &dyn Fn(&str) -> bool| {
            let mut all = pass.options.clone();
            all.extend(given.options.iter().filter(|(k, _)| set(k)).map(|(k, v)| (k.clone(), v.clone())));
            (pass.make)(Json::Object(all))
        };
        match with(&|_| true) {
            Ok(pass) => Ok(pass),
            Err(MakeError::Pass(error)) => Err(pipeline.error(step, None, format!("`{}`: {error}", pass.name), None)),
            Err(MakeError::Option(error)) => {
                // The option that alone already fails is the one to point at.
                let culprit =
                    given.options.keys().find(|k| matches!(with(&|s| s == k.as_str()), Err(MakeError::Option(_))));
                let default = culprit.and_then(|k| Some((k, pass.options.get(k).filter(|v| !v.is_null())?)));
                let default = default.map(|(k, v)| format!("the default is {k}={v}"));
                let message = format!("`{}`: {error}", pass.name);
                Err(pipeline.error(step, culprit.map(String::as_str), message, default))
            }
        }
    }
}

fn suggestion(name: &str, known: &[&str], what: &str) -> String {
    match (nearest(name, known.iter().copied()), known) {
        (_, []) => format!("there are no {what}"),
        (Some(near), _) => format!("did you mean `{near}`? The {what} are: {}", known.join(", ")),
        (None, _) => format!("the {what} are: {}", known.join(", ")),
    }
}
