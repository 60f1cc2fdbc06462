//! Between SPDK's JSON and serde's.

use serde_json::{Map, Value};
use spdk_sys as sys;
use spdk_sys::spdk_json_val_type as kind;
use std::ffi::{CString, c_void};

/// Turns SPDK's parsed values into serde's.
///
/// # Errors
/// A sentence, for what SPDK's parser should not have let through, and for an object that has a key twice.
///
/// # Safety
/// `values` is null or the first of a complete, decoded value as SPDK's parser made it.
pub(super) unsafe fn to_value(values: *const sys::spdk_json_val) -> Result<Value, String> {
    if values.is_null() {
        return Ok(Value::Null);
    }
    // SAFETY: as the caller promises.
    unsafe { Reader { next: values }.value() }
}

struct Reader {
    next: *const sys::spdk_json_val,
}

impl Reader {
    /// # Safety
    /// `next` is inside a complete value.
    unsafe fn value(&mut self) -> Result<Value, String> {
        // SAFETY: as the caller promises; `next` moves over a value at a time, and every container says how long it is.
        unsafe {
            let val = *self.next;
            self.next = self.next.add(1);
            Ok(match val.type_ {
                kind::SPDK_JSON_VAL_NULL => Value::Null,
                kind::SPDK_JSON_VAL_TRUE => Value::Bool(true),
                kind::SPDK_JSON_VAL_FALSE => Value::Bool(false),
                kind::SPDK_JSON_VAL_NUMBER => {
                    let text = text(&val)?;
                    serde_json::from_str(&text).map_err(|_| format!("{text} is not a number"))?
                }
                kind::SPDK_JSON_VAL_STRING => Value::String(text(&val)?),
                kind::SPDK_JSON_VAL_ARRAY_BEGIN => {
                    let end = self.next.add(val.len as usize);
                    let mut array = Vec::new();
                    while self.next < end {
                        array.push(self.value()?);
                    }
                    self.next = end.add(1);
                    Value::Array(array)
                }
                kind::SPDK_JSON_VAL_OBJECT_BEGIN => {
                    let end = self.next.add(val.len as usize);
                    let mut object = Map::new();
                    while self.next < end {
                        let name = text(&*self.next)?;
                        self.next = self.next.add(1);
                        let value = self.value()?;
                        if object.insert(name.clone(), value).is_some() {
                            return Err(format!("{name} is given twice"));
                        }
                    }
                    self.next = end.add(1);
                    Value::Object(object)
                }
                other => return Err(format!("a JSON value of unknown type {other}")),
            })
        }
    }
}

/// # Safety
/// `val` is a name, a string or a number of SPDK's parser.
unsafe fn text(val: &sys::spdk_json_val) -> Result<String, String> {
    // SAFETY: these point to `len` bytes of the parsed text.
    let bytes = unsafe { std::slice::from_raw_parts(val.start.cast::<u8>(), val.len as usize) };
    String::from_utf8(bytes.to_vec()).map_err(|_| "a string is not UTF-8".to_owned())
}

/// Writes a whole value.
///
/// # Safety
/// `writer` is a live writer at a place where a value may stand.
pub(super) unsafe fn write(writer: *mut sys::spdk_json_write_ctx, value: &Value) {
    let text = value.to_string();
    // SAFETY: a live writer; the text is complete JSON of the length given.
    unsafe { sys::spdk_json_write_val_raw(writer, text.as_ptr().cast::<c_void>(), text.len()) };
}

/// Writes a name and its value.
///
/// # Safety
/// `writer` is a live writer inside an object.
pub(super) unsafe fn write_named(writer: *mut sys::spdk_json_write_ctx, name: &str, value: &Value) {
    let name = CString::new(name).unwrap_or_default();
    // SAFETY: a live writer; the name is a C string.
    unsafe {
        sys::spdk_json_write_name(writer, name.as_ptr());
        write(writer, value);
    }
}

#[cfg(test)]
#[path = "../../tests/common/fuzz.rs"]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::fuzz::{fuzz, json, mutated};
    use super::*;

    unsafe extern "C" {
        fn spdk_json_parse(
            json: *mut c_void,
            size: usize,
            values: *mut sys::spdk_json_val,
            num_values: usize,
            end: *mut *mut c_void,
            flags: u32,
        ) -> isize;
    }

    /// What SPDK's parser and we make of a text; none where SPDK refuses it.
    fn parse_bytes(text: &[u8]) -> Option<Result<Value, String>> {
        let mut bytes = text.to_vec();
        // SAFETY: zeroes are a valid spdk_json_val.
        let mut values: Vec<sys::spdk_json_val> = vec![unsafe { std::mem::zeroed() }; 256];
        let mut end = std::ptr::null_mut();
        // SAFETY: the buffers are live and their lengths given; flag 1 is SPDK_JSON_PARSE_FLAG_DECODE_IN_PLACE.
        let n =
            unsafe { spdk_json_parse(bytes.as_mut_ptr().cast(), bytes.len(), values.as_mut_ptr(), 256, &mut end, 1) };
        // SAFETY: a complete value was parsed, which had room.
        (1..=256).contains(&n).then(|| unsafe { to_value(values.as_ptr()) })
    }

    fn parse(text: &str) -> Result<Value, String> {
        parse_bytes(text.as_bytes()).unwrap_or_else(|| panic!("SPDK does not parse {text}"))
    }

    #[test]
    fn whatever_spdk_parses_serde_parses_alike() {
        fuzz(&json(), |value| {
            let text = value.to_string();
            assert!(parse_bytes(text.as_bytes()).is_none_or(|parsed| parsed == Ok(value)), "{text}");
        });
    }

    #[test]
    fn no_text_does_harm() {
        let corpus = [
            r#"{"filename": "/lustre/\u00e5\ud83d\ude00\n", "offset": 18446744073709551615, "more": [1e999, -0.5E-7, {}, []]}"#,
            r#"{"name": "lloop0", "force": true, "deep": [[[[[[[[[[{"a": {"b": null}}]]]]]]]]]]}"#,
        ];
        fuzz(&mutated(corpus.map(|text| text.as_bytes().to_vec()).to_vec()), |text| {
            if let Some(Ok(value)) = parse_bytes(&text) {
                assert_eq!(parse(&value.to_string()), Ok(value));
            }
        });
    }

    #[test]
    fn what_spdk_parses_is_what_serde_parses() {
        for text in [
            r#"{"a":1,"b":[true,false,null,{"c":"x\nå"},[]],"d":{},"e":-1.5e3,"f":18446744073709551615}"#,
            r#"[]"#,
            r#""text""#,
        ] {
            assert_eq!(parse(text), Ok(serde_json::from_str(text).unwrap()), "{text}");
        }
    }

    #[test]
    fn a_key_stands_once() {
        assert_eq!(parse(r#"{"a":1,"a":2}"#), Err("a is given twice".to_owned()));
    }
}
