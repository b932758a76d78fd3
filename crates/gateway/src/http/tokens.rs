//! `/tokenize` and `/detokenize`: questions to a model's tokenizer, which any replica of it answers alike.
//!
//! The gateway has no tokenizer. It sends the question to the lightest of two replicas, once more to another one where
//! that fails, and passes the answer on. It costs a request of the key's limits and no tokens.

use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut as _, Bytes, BytesMut};
use consort_api::Protocol;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};

use super::answers::passed_on;
use super::body::Body;
use super::front::{Context, Front};
use super::read;
use crate::error::{Outcome, Refusal};
use crate::fleet::{Model, Replica, Went, Work};
use crate::json::{self, Object};
use crate::policy::balance::{self, Candidate};
use crate::policy::canary;
use crate::proxy::call::explain;
use crate::proxy::{Question, ask, random};

/// Replicas that may fail a question, one after the other.
const TRIES: usize = 2;

impl Front {
    pub(crate) async fn tokens(
        &self,
        request: Request<Incoming>,
        path: &'static str,
        context: &mut Context,
    ) -> Outcome<Response<Body>> {
        let settings = self.gateway.settings();
        let (parts, body) = request.into_parts();
        let body = read::read(&parts.headers, body, &settings.clients, &self.in_flight).await?;
        let (name, body) = read_question(body)?;
        let key = context.record.key.clone();
        let model = self.model(name.as_deref(), key.as_deref())?;
        if let Some(key) = &key {
            key.take(Instant::now(), 0)?;
            context.record.charged = Some(0);
        }
        let client = key.as_ref().map_or_else(|| context.peer.ip().to_string(), |key| key.id.clone());
        let shares = model.versions.iter().map(|version| (version.name.as_str(), version.weight));
        let version = canary::choose(canary::mix(0, &client), shares).unwrap_or(0);
        let headers = context.headers();
        let mut failed: Vec<Arc<Replica>> = Vec::new();
        while failed.len() < TRIES {
            let Some(replica) = pick(&model, version, &failed) else { break };
            let question =
                Question { path, headers: headers.to_vec(), body: body.clone(), work: Work::default() };
            match ask(&replica, question, &settings.replicas, context.deadline).await {
                Ok(said) => {
                    replica.went(Instant::now(), Went::Well, true);
                    return Ok(passed_on(said));
                }
                Err(failure) => {
                    replica.went(Instant::now(), Went::Unknown, true);
                    self.gateway.telemetry.failure(&replica.id, failure.name());
                    failed.push(replica);
                }
            }
        }
        let mut replicas = model.versions[version].replicas.iter();
        if failed.is_empty() && replicas.any(|replica| replica.protocol == Protocol::OpenAi) {
            let message = format!("the server of {:?} has no {path} that is known here", model.name);
            return Err(Refusal::new(StatusCode::NOT_FOUND, "not_found", message));
        }
        Err(Refusal::unavailable(format!("no replica of {:?} can answer {path} now; try again", model.name)))
    }
}

fn pick(model: &Model, version: usize, failed: &[Arc<Replica>]) -> Option<Arc<Replica>> {
    let now = Instant::now();
    let version = model.versions.get(version)?;
    let fit: Vec<(&Arc<Replica>, Candidate)> = version
        .replicas
        .iter()
        .filter(|replica| replica.protocol == Protocol::Consort)
        .filter(|replica| !failed.iter().any(|other| Arc::ptr_eq(other, replica)))
        .map(|replica| (replica, replica.candidate(replica.fitness(now).share)))
        .filter(|(_, candidate)| candidate.share > 0.0)
        .collect();
    let candidates: Vec<Candidate> = fit.iter().map(|(_, candidate)| *candidate).collect();
    balance::lighter(&candidates, 0, random()).map(|index| Arc::clone(fit[index].0))
}

/// The model's name, and the body without it: a replica has its own name for what it serves.
fn read_question(body: Bytes) -> Outcome<(Option<String>, Bytes)> {
    let text = std::str::from_utf8(&body)
        .map_err(|e| Refusal::json(format!("the body is not UTF-8: byte {} is wrong", e.valid_up_to())))?;
    let wrong = |at| Refusal::json(explain(text, at));
    let (mut object, mut at) = (Object::new(text).map_err(wrong)?, None);
    while let Some(member) = object.next().map_err(wrong)? {
        if member.key == "model" && at.replace(member.value).is_some() {
            return Err(Refusal::param("model", "model stands twice; send it once"));
        }
    }
    let Some(at) = at.filter(|at| &text[at.clone()] != "null") else { return Ok((None, body.clone())) };
    let name = json::string(&text[at.clone()]).map(|name| name.into_owned());
    let name = name.ok_or_else(|| {
        Refusal::param("model", format!("model must be a string, not {}", json::kind(&text[at.clone()])))
    })?;
    let mut out = BytesMut::with_capacity(body.len());
    out.put_slice(&body[..at.start]);
    out.put_slice(b"null");
    out.put_slice(&body[at.end..]);
    Ok((Some(name), out.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_name_is_taken_out() {
        let read = |text: &str| read_question(Bytes::copy_from_slice(text.as_bytes()));
        let (name, body) = read(r#"{"model": "m", "prompt": "a"}"#).unwrap();
        assert_eq!((name.as_deref(), &body[..]), (Some("m"), &br#"{"model": null, "prompt": "a"}"#[..]));
        assert_eq!(read("{}").unwrap().0, None);
        for (wrong, message) in [
            ("[]", "must be a JSON object"),
            (r#"{"model":1}"#, "must be a string"),
            (r#"{"model":"a","model":"b"}"#, "twice"),
        ] {
            assert!(read(wrong).unwrap_err().message.contains(message), "{wrong}");
        }
    }
}
