//! JSON that has one reading only.
//!
//! Parts of a request reach the policy as the very text the client sent. That is fast, and
//! safe only if every parser agrees on what the text means. RFC 8259 leaves repeated keys to
//! the parser (some take the first, some the last), so a text with a repeated key is refused
//! here, as is nesting beyond what [`serde_json`] itself reads and anything that is not JSON
//! in the first place. [`StrictText`] is the proof that a text has passed.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};

/// How much of a repeated key an error quotes; a key may be as long as the whole body.
const QUOTED_KEY_CHARS_MAX: usize = 64;

/// A JSON value as text: well formed, no key twice in one object at any depth, and nested no
/// deeper than `serde_json` reads (127 levels).
#[derive(Debug, Clone, Copy)]
pub(crate) struct StrictText<'a> {
    raw: &'a RawValue,
    values: usize,
}

impl<'a> StrictText<'a> {
    /// Reads the text once, without building a tree.
    ///
    /// # Errors
    ///
    /// A repeated key is a data error that names it. Deep nesting, a number beyond `f64` and
    /// half a surrogate pair are syntax errors. Positions count from the start of this value.
    pub(crate) fn check(raw: &'a RawValue) -> Result<Self, serde_json::Error> {
        let mut deserializer = serde_json::Deserializer::from_str(raw.get());
        let mut walk = Walk { open_keys: Vec::new(), values: 0 };
        Step(&mut walk).deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(Self { raw, values: walk.values })
    }

    /// The text of the value, without surrounding whitespace.
    pub(crate) fn text(&self) -> &'a str {
        self.raw.get()
    }

    /// How many values the text holds, itself and the inner ones: what a tree of it costs.
    pub(crate) fn values(&self) -> usize {
        self.values
    }

    /// Builds the tree.
    ///
    /// `Value`'s own deserialiser would not do: an object whose first key is the name that
    /// `serde_json` uses internally for raw values is replaced there by the JSON *inside* the
    /// string under that key, which is another document than the one every other parser sees.
    ///
    /// # Errors
    ///
    /// None are expected after [`StrictText::check`], which has read the same text.
    pub(crate) fn tree(&self) -> Result<Value, serde_json::Error> {
        let mut deserializer = serde_json::Deserializer::from_str(self.raw.get());
        let tree = Plant.deserialize(&mut deserializer)?;
        deserializer.end()?;
        Ok(tree)
    }
}

/// The state of one walk over a text.
struct Walk<'de> {
    /// Keys of all objects that are still open, outermost first. One stack for the whole walk
    /// instead of a set per object: a typical request then costs a single allocation.
    open_keys: Vec<Cow<'de, str>>,
    values: usize,
}

/// Walks one value and leaves nothing but the count.
struct Step<'w, 'de>(&'w mut Walk<'de>);

impl<'de> DeserializeSeed<'de> for Step<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.0.values = self.0.values.saturating_add(1);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Step<'_, 'de> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while sequence.next_element_seed(Step(self.0))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let first = self.0.open_keys.len();
        while let Some(key) = map.next_key_seed(Key)? {
            self.0.open_keys.push(key);
            map.next_value_seed(Step(self.0))?;
        }
        // Inner objects have taken their keys off again, so the rest of the stack is ours.
        let keys = self.0.open_keys.get_mut(first..).unwrap_or_default();
        let repeated = repeated_key(keys);
        if let Some(key) = repeated {
            let quoted: String = key.chars().take(QUOTED_KEY_CHARS_MAX).collect();
            return Err(A::Error::custom(format_args!("duplicate key `{quoted}`")));
        }
        self.0.open_keys.truncate(first);
        Ok(())
    }
}

/// A key that occurs twice, if there is one. Sorting bounds the cost for hostile objects with
/// a million keys, and is a single pass over the already sorted ones that are usual here.
fn repeated_key<'k>(keys: &'k mut [Cow<'_, str>]) -> Option<&'k str> {
    keys.sort_unstable();
    keys.windows(2).find_map(|pair| match pair {
        [left, right] if left == right => Some(left.as_ref()),
        _ => None,
    })
}

/// Reads an object key with its escapes resolved, borrowed where it has none.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Key {
    type Value = Cow<'de, str>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object key")
    }

    fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(key))
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(key.to_owned()))
    }
}

/// Builds the tree of one value.
struct Plant;

impl<'de> DeserializeSeed<'de> for Plant {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Plant {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element_seed(Plant)? {
            elements.push(element);
        }
        Ok(Value::Array(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(key) = map.next_key_seed(Key)? {
            members.insert(key.into_owned(), map.next_value_seed(Plant)?);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::error::Category;

    fn check(text: &str) -> Result<usize, serde_json::Error> {
        let raw: &RawValue = serde_json::from_str(text)?;
        StrictText::check(raw).map(|strict| strict.values())
    }

    fn refusal(text: &str) -> String {
        check(text).unwrap_err().to_string()
    }

    fn tree(text: &str) -> Value {
        StrictText::check(serde_json::from_str(text).unwrap()).unwrap().tree().unwrap()
    }

    #[test]
    fn every_value_is_counted_once() {
        assert_eq!(check("null").unwrap(), 1);
        assert_eq!(check("[]").unwrap(), 1);
        assert_eq!(check(r#"{"a":[1,-2,3.5,true],"b":{"c":"d"}}"#).unwrap(), 8);
    }

    #[test]
    fn the_same_key_in_different_objects_is_fine() {
        assert_eq!(check(r#"{"a":{"a":{"b":1}},"b":[{"a":1},{"a":1}]}"#).unwrap(), 9);
    }

    #[test]
    fn a_repeated_key_is_refused_and_named() {
        let error = check(r#"{"x":1,"y":2,"x":3}"#).unwrap_err();
        assert_eq!(error.classify(), Category::Data);
        assert!(error.to_string().contains("duplicate key `x`"), "{error}");
    }

    #[test]
    fn a_repeated_key_is_refused_at_any_depth() {
        assert!(refusal(r#"[{"k":{"x":1,"x":1}}]"#).contains("duplicate key `x`"));
        assert!(refusal(r#"{"k":{"x":1},"j":[0],"k":1}"#).contains("duplicate key `k`"));
    }

    #[test]
    fn a_repeated_key_is_refused_however_it_is_spelt() {
        assert!(refusal(r#"{"ab":1,"\u0061b":2}"#).contains("duplicate key `ab`"));
        assert!(refusal(r#"{"":1,"":2}"#).contains("duplicate key ``"));
    }

    #[test]
    fn a_repeated_key_is_refused_in_a_large_object() {
        let members: Vec<String> = (0..50_000).map(|n| format!(r#""k{n}":{n}"#)).collect();
        let fine = format!("{{{}}}", members.join(","));
        assert_eq!(check(&fine).unwrap(), 50_001);
        let repeated = format!(r#"{{{},"k17":0}}"#, members.join(","));
        assert!(refusal(&repeated).contains("duplicate key `k17`"));
    }

    #[test]
    fn a_long_repeated_key_is_not_quoted_in_full() {
        let key = "é".repeat(10_000);
        assert!(refusal(&format!(r#"{{"{key}":1,"{key}":2}}"#)).len() < 300);
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(check(&nested(127)).unwrap(), 127);
        for depth in [128, 129, 100_000] {
            let error = check(&nested(depth)).unwrap_err();
            assert_eq!(error.classify(), Category::Syntax);
            assert!(error.to_string().contains("recursion limit"), "{error}");
        }
    }

    #[test]
    fn what_only_the_raw_reader_lets_through_is_refused() {
        assert!(refusal("[1e999]").contains("number out of range"));
        assert_eq!(check(r#"["\ud800"]"#).unwrap_err().classify(), Category::Syntax);
    }

    #[test]
    fn the_tree_is_the_one_serde_json_builds() {
        let text = r#"{"a":[null,true,-1,18446744073709551615,2.5,"\u00e9\n"],"b":{"c":{}}}"#;
        assert_eq!(tree(text), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn the_library_s_private_key_is_an_ordinary_key() {
        let text = r#"{"$serde_json::private::RawValue":"{\"smuggled\":true}"}"#;
        assert_eq!(
            tree(text).get("$serde_json::private::RawValue"),
            Some(&Value::String(r#"{"smuggled":true}"#.to_owned()))
        );
    }
}
