//! JSON-RPC methods as typed async functions.

use super::{app, json, panic_text, thread};
use crate::error::Error;
use async_trait::async_trait;
use futures::FutureExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use spdk_sys as sys;
use std::ffi::{CStr, CString};
use std::panic::AssertUnwindSafe;

/// JSON-RPC's code for parameters that do not fit the method.
pub const INVALID_PARAMS: i32 = -32602;
const INTERNAL_ERROR: i32 = -32603;

/// A method. It runs on the application's thread and may wait there for what happens elsewhere.
#[async_trait(?Send)]
pub trait Method: 'static {
    /// Its name on the wire.
    const NAME: &'static CStr;
    /// Whether it may be called before the subsystems are initialised, too (`--wait-for-rpc`).
    const AT_STARTUP: bool = false;
    /// Its parameters. They should deny unknown fields.
    type Params: DeserializeOwned;
    /// What it answers.
    type Reply: Serialize;

    /// Does it.
    async fn call(params: Self::Params) -> Result<Self::Reply, Error>;
}

/// Registers a method, before or after the start of the application.
pub fn register<M: Method>() {
    // SPDK_RPC_STARTUP and SPDK_RPC_RUNTIME, which are macros.
    let states = if M::AT_STARTUP { 1 | 2 } else { 2 };
    // SAFETY: the name is a C string, which SPDK copies; the handler takes what SPDK passes.
    unsafe { sys::spdk_rpc_register_method(M::NAME.as_ptr(), Some(handle::<M>), states) };
}

/// A request that has to be answered once.
struct Pending(*mut sys::spdk_jsonrpc_request);

impl Pending {
    fn reply(self, value: &Value) {
        if app::answers_are_over() {
            return;
        }
        // SAFETY: the request is live until it is answered, which happens here, once; a null writer means that the client
        // wants no answer.
        unsafe {
            let writer = sys::spdk_jsonrpc_begin_result(self.0);
            if !writer.is_null() {
                json::write(writer, value);
                sys::spdk_jsonrpc_end_result(self.0, writer);
            }
        }
    }

    fn refuse(self, code: i32, message: &str) {
        if app::answers_are_over() {
            return;
        }
        let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
        // SAFETY: as in `reply`; the message is copied.
        unsafe { sys::spdk_jsonrpc_send_error_response(self.0, code, message.as_ptr()) };
    }
}

unsafe extern "C" fn handle<M: Method>(request: *mut sys::spdk_jsonrpc_request, params: *const sys::spdk_json_val) {
    let pending = Pending(request);
    let called = super::guard("reading parameters", || {
        // SAFETY: SPDK passes null or the parameters, parsed and decoded, valid during this call.
        unsafe { json::to_value(params) }.and_then(parse::<M::Params>)
    });
    match called {
        Some(Ok(params)) => thread::spawn(async move {
            match AssertUnwindSafe(M::call(params)).catch_unwind().await {
                Ok(Ok(reply)) => pending.reply(&serde_json::to_value(reply).unwrap_or(Value::Null)),
                Ok(Err(error)) => {
                    // Escaped: a file's name may hold line breaks, and must not be able to forge lines of the log.
                    tracing::warn!("{}: {}", M::NAME.to_string_lossy(), error.message.escape_debug());
                    pending.refuse(-error.errno, &error.message);
                }
                Err(panic) => {
                    let text = panic_text(panic.as_ref());
                    tracing::error!("a bug in lloop: {} panicked: {text}", M::NAME.to_string_lossy());
                    pending.refuse(INTERNAL_ERROR, &format!("a bug in lloop: {text}"));
                }
            }
        }),
        Some(Err(message)) => pending.refuse(INVALID_PARAMS, &format!("Invalid parameters: {message}")),
        None => pending.refuse(INTERNAL_ERROR, "a bug in lloop, see the target's log"),
    }
}

/// Parameters from JSON.
///
/// # Errors
/// A sentence that names the key that does not fit.
pub fn parse<P: DeserializeOwned>(value: Value) -> Result<P, String> {
    let value = if value.is_null() { Value::Object(Map::new()) } else { value };
    if !value.is_object() {
        return Err("they must be an object of named parameters".to_owned());
    }
    serde_path_to_error::deserialize(value).map_err(|error| match error.path().to_string().as_str() {
        "." | "" => error.inner().to_string(),
        path => {
            let inner = error.inner().to_string();
            // serde names an unknown or missing field itself.
            if inner.contains(&format!("`{path}`")) { inner } else { format!("{path}: {inner}") }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Params {
        name: String,
        #[serde(default)]
        size: u64,
    }

    #[test]
    fn errors_name_the_key() {
        assert_eq!(parse(json!({"name": "x"})), Ok(Params { name: "x".into(), size: 0 }));
        for (value, expected) in [
            (json!({"name": 3}), "name: invalid type"),
            (json!({"name": "x", "size": -1}), "size: invalid value"),
            (json!({"name": "x", "sise": 1}), "unknown field `sise`"),
            (json!({}), "missing field `name`"),
            (Value::Null, "missing field `name`"),
            (json!(["x"]), "must be an object"),
        ] {
            let error = parse::<Params>(value).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
