//! The typed part of an `AdmissionRequest`: which keys there are and in which order the
//! policy sees them.
//!
//! Reading into these structures and writing them out again is the normalisation: a key that
//! is not here is dropped, and an optional one that is `null` becomes absent.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::json_object::Object;

/// The order of the fields is the order of the keys that the policy sees.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AdmissionRequest<'a> {
    #[serde(borrow)]
    pub(crate) uid: Text<'a>,
    #[serde(borrow)]
    pub(crate) kind: Object<GroupVersionKind<'a>>,
    #[serde(borrow)]
    pub(crate) resource: Object<GroupVersionResource<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) sub_resource: Option<Text<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) request_kind: Option<Object<GroupVersionKind<'a>>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) request_resource: Option<Object<GroupVersionResource<'a>>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) request_sub_resource: Option<Text<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<Text<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<Text<'a>>,
    #[serde(borrow)]
    pub(crate) operation: Text<'a>,
    #[serde(borrow)]
    pub(crate) user_info: Object<UserInfo<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) old_object: Option<&'a RawValue>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    pub(crate) options: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dry_run: Option<bool>,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct GroupVersionKind<'a> {
    #[serde(borrow)]
    group: Text<'a>,
    #[serde(borrow)]
    version: Text<'a>,
    #[serde(borrow)]
    kind: Text<'a>,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct GroupVersionResource<'a> {
    #[serde(borrow)]
    group: Text<'a>,
    #[serde(borrow)]
    version: Text<'a>,
    #[serde(borrow)]
    resource: Text<'a>,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct UserInfo<'a> {
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    username: Option<Text<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    uid: Option<Text<'a>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<Text<'a>>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    extra: Option<Extra<'a>>,
}

/// A string, borrowed unless it has escapes. Serde borrows a bare `Cow` field but not one
/// inside an `Option` or a `Vec`; a type of our own is borrowed everywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// What an authenticator adds about a user. A map of serde's own would let the last of two
/// equal keys win; this one refuses them, as the structures around it do.
#[derive(Serialize)]
pub(crate) struct Extra<'a>(BTreeMap<Text<'a>, Vec<Text<'a>>>);

impl<'de: 'a, 'a> Deserialize<'de> for Extra<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = BTreeMap<Text<'de>, Vec<Text<'de>>>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map from strings to lists of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<Text<'de>, _>()? {
                    match members.entry(key) {
                        Entry::Vacant(free) => free.insert(value),
                        Entry::Occupied(taken) => {
                            let key = &taken.key().0;
                            return Err(A::Error::custom(format_args!("duplicate key `{key}`")));
                        }
                    };
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(Members).map(Self)
    }
}
