//! Paths and methods: which request goes where.
#![forbid(unsafe_code)]

use hyper::header::{ALLOW, HeaderValue};
use hyper::{Method, StatusCode};
use percent_encoding::percent_decode_str;

use super::refusal::Refusal;
use crate::admission::Origin;

/// The endpoints that judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    Validate,
    ValidateRaw,
    Audit,
}

impl Endpoint {
    /// Its name in the log.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Validate => "validate",
            Self::ValidateRaw => "validate_raw",
            Self::Audit => "audit",
        }
    }

    /// Whether its verdicts are enforced.
    pub(super) const fn origin(self) -> Origin {
        match self {
            Self::Validate | Self::ValidateRaw => Origin::Validate,
            Self::Audit => Origin::Audit,
        }
    }
}

/// Where a path leads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Judge(Endpoint, String),
    Readiness,
    Liveness,
}

/// Where the request goes.
///
/// # Errors
/// No such path, or another method is wanted.
pub(super) fn route(method: &Method, path: &str) -> Result<Route, Refusal> {
    let not_found = || Refusal::new(StatusCode::NOT_FOUND, format!("no such path: {path}"));
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/');
    let (route, allowed) = match (segments.next(), segments.next(), segments.next()) {
        (Some("readiness"), None, None) => (Route::Readiness, Method::GET),
        (Some("liveness"), None, None) => (Route::Liveness, Method::GET),
        (Some(endpoint), Some(id), None) if !id.is_empty() => {
            let endpoint = match endpoint {
                "validate" => Endpoint::Validate,
                "validate_raw" => Endpoint::ValidateRaw,
                "audit" => Endpoint::Audit,
                _ => return Err(not_found()),
            };
            (
                Route::Judge(endpoint, percent_decode_str(id).decode_utf8_lossy().into_owned()),
                Method::POST,
            )
        }
        _ => return Err(not_found()),
    };
    if *method == allowed || (*method == Method::HEAD && allowed == Method::GET) {
        return Ok(route);
    }
    let message = format!("{path} takes {allowed}, not {method}");
    let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message);
    Err(refusal.with_header(ALLOW, HeaderValue::from_str(allowed.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: &Method, path: &str) -> u16 {
        route(method, path).map_or_else(|refusal| refusal.status.as_u16(), |_| 200)
    }

    #[test]
    fn paths_lead_to_their_endpoints() {
        let judge = |path| route(&Method::POST, path).unwrap();
        assert_eq!(judge("/validate/p"), Route::Judge(Endpoint::Validate, "p".to_owned()));
        assert_eq!(judge("/audit/a%2Fb"), Route::Judge(Endpoint::Audit, "a/b".to_owned()));
        assert_eq!(
            judge("/validate_raw/p%20q"),
            Route::Judge(Endpoint::ValidateRaw, "p q".to_owned())
        );
        assert_eq!(route(&Method::GET, "/readiness").unwrap(), Route::Readiness);
    }

    #[test]
    fn other_paths_and_methods_are_refused() {
        for path in
            ["/", "", "/validate", "/validate/", "/validate/a/b", "/nothing/p", "/readiness/x"]
        {
            assert_eq!(status(&Method::POST, path), 404, "{path}");
        }
        assert_eq!(status(&Method::GET, "/validate/p"), 405);
        assert_eq!(status(&Method::POST, "/liveness"), 405);
        assert_eq!(status(&Method::HEAD, "/readiness"), 200);
    }
}
