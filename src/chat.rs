//! Chat templates: the Jinja text that a checkpoint carries, rendered by minijinja as transformers would.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, context};
use serde::Serialize;

use crate::failure::{Exit, Failure};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Turn {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: Content,
}

/// What was said, or shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Content {
    /// A text.
    Text(String),
    /// Texts and images in turn, for templates that ask what a part is.
    Parts(Vec<Part>),
}

/// A part of what was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Part {
    /// An image.
    Image,
    /// A text.
    Text {
        /// Its words.
        text: String,
    },
}

impl Content {
    /// What `text` says, as `template` wants it, with an image where `mark` stands.
    pub fn of(text: &str, template: &str, mark: &str) -> Self {
        // A template that takes texts as well says so.
        if !template.contains("type") || template.contains("is string") {
            return Content::Text(text.to_owned());
        }
        let mut parts = Vec::new();
        for (i, text) in text.split(mark).enumerate() {
            if i > 0 {
                parts.push(Part::Image);
            }
            if !text.trim().is_empty() {
                parts.push(Part::Text { text: text.to_owned() });
            }
        }
        Content::Parts(parts)
    }
}

/// Renders `turns` and the opening of the assistant's answer.
///
/// # Errors
/// When the template is broken or refuses the conversation.
pub fn render(template: &str, turns: &[Turn], bos: &str, eos: &str) -> Result<String, Failure> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(fails)?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    let template = env.template_from_str(template);
    let rendered = template.and_then(|t| {
        t.render(
            context! { messages => Serde(turns), add_generation_prompt => true, bos_token => bos, eos_token => eos },
        )
    });
    rendered.map_err(fails)
}

fn fails(error: Error) -> Failure {
    Failure::new(Exit::BadInput, format!("the checkpoint's chat template fails: {error}"))
        .help("run without --chat to give the prompt as it is")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_sees_turns_and_opens_the_answer() {
        let template = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'].strip() }}{{ eos_token }}\n{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";
        let turns = [Turn { role: "user".into(), content: Content::Text(" hi ".into()) }];
        assert_eq!(render(template, &turns, "", "</s>").expect("it renders"), "<|user|>hi</s>\n<|assistant|>");
    }

    #[test]
    fn a_refusal_by_the_template_is_an_error_with_its_words() {
        let e = render("{{ raise_exception('roles must alternate') }}", &[], "", "").expect_err("it refuses");
        assert!(e.message.contains("roles must alternate"), "{e}");
    }
}
