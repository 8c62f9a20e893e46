//! The text form: reading, writing, and the expressions of templates.
//!
//! The grammar is part of the language reference in the crate's documentation. [`print`] writes what [`parse`] reads:
//! reading the printed text gives a module of the same meaning, and printing that gives the same text.

mod attr;
mod body;
mod cursor;
mod expr;
mod fragment;
mod lex;
mod line;
mod names;
mod parse;
mod print;
mod scope;
mod term;
mod types;

use serde_json::{Map, Value as Json};

use crate::diag::Diagnostics;
use crate::module::Module;
use crate::region::Region;

pub use fragment::{Callee, Fragment, FragmentLine, FragmentOperand, parse_fragment, parse_fragment_with};
pub use parse::VERSION;

pub(crate) use body::LONGEST;
pub(crate) use cursor::DEPTH;
pub(crate) use lex::{is_sigil_name, is_word};
pub(crate) use parse::LAYERS;
pub(crate) use print::{Definition, Entity, Form, line_text, print_mapped, tables};

use cursor::Fail;

/// What a template may ask about the checkpoint that it is filled in for.
pub trait Env {
    /// The value of a dotted name such as `config.hidden_size`; `None` or null if there is none.
    fn lookup(&self, path: &str) -> Option<Json>;

    /// Whether the checkpoint has a tensor of this full name.
    fn tensor(&self, name: &str) -> bool;
}

/// The environment of a text that is no template: no names, and every tensor is there.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEnv;

impl Env for NoEnv {
    fn lookup(&self, _: &str) -> Option<Json> {
        None
    }

    fn tensor(&self, _: &str) -> bool {
        true
    }
}

/// Reads a module.
///
/// # Errors
/// `P01` form, `P02` names, `P03` types and attributes, `P04` expressions, `P05` size; each points into the text.
pub fn parse(text: &str) -> Result<Module, Diagnostics> {
    parse_with(text, &NoEnv)
}

/// Reads a module from a template that refers to `env`.
///
/// # Errors
/// As [`parse`], and `P04` when a `require` of the template does not hold.
pub fn parse_with(text: &str, env: &dyn Env) -> Result<Module, Diagnostics> {
    parse::module(text, env).map_err(|f| f.report(text))
}

/// Writes a module. Neighbouring layers that differ in nothing but their number are written once.
pub fn print(module: &Module) -> String {
    print::module(module)
}

/// Writes one region of a module.
pub fn print_region(module: &Module, region: &Region) -> String {
    print_mapped(module, region, Form::Region).text
}

/// Reads attributes, with or without their braces: `{bits=4, group=128}`.
///
/// # Errors
/// `P01` and `P02`, pointing into the text.
pub fn parse_attributes(text: &str) -> Result<Map<String, Json>, Diagnostics> {
    let read = || {
        let mut c = cursor::Cursor::new(text)?;
        let fields = if c.eat("{") {
            let fields = expr::fields(&mut c, "}")?;
            match c.peek() {
                lex::Tok::End => fields,
                _ => return Err(c.expected("the end of the attributes")),
            }
        } else {
            expr::fields_to_end(&mut c)?
        };
        scope::Scope::new(&NoEnv, text.len()).attributes(&fields)
    };
    read().map_err(|f: Fail| f.report(text))
}

/// The truth of a condition over the names of `env`.
///
/// # Errors
/// `P01` form, `P02` names, `P04` when it has no value or is no condition; each points into the text.
pub fn holds(text: &str, env: &dyn Env) -> Result<bool, Diagnostics> {
    let read = || {
        let mut c = cursor::Cursor::new(text)?;
        let condition = expr::Expr::parse(&mut c)?;
        match c.peek() {
            lex::Tok::End => scope::Scope::new(env, text.len()).truth(&condition),
            _ => Err(c.expected("the end of the condition")),
        }
    };
    read().map_err(|f: Fail| f.report(text))
}

/// Writes attributes with their braces; [`parse_attributes`] reads them.
pub fn print_attributes(attributes: &Map<String, Json>) -> String {
    format!("{{{}}}", attr::fields(attributes))
}
