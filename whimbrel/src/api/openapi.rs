//! The table of an API's routes, which makes both its router and its description by OpenAPI.
//!
//! Whatever is added to a [`Table`] is served and described: neither is there without the other.

use super::model::ErrorBody;
use super::server::{MAX_BODY, Refusal};
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{SecurityRequirement, SecurityScheme};
use utoipa::openapi::server::{ServerBuilder, ServerVariableBuilder};
use utoipa::openapi::{ContentBuilder, Info, License, OpenApi, OpenApiBuilder, Ref, ResponseBuilder};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

/// The routes of an API. They are made by [`utoipa_axum::routes`] of handlers that have descriptions.
pub(crate) struct Table<S>(OpenApiRouter<S>);

impl<S: Clone + Send + Sync + 'static> Table<S> {
    /// An API that has this title, and no routes yet.
    pub fn new(title: &str, description: &str) -> Self {
        let mut info = Info::new(title, env!("CARGO_PKG_VERSION"));
        info.description = Some(description.into());
        let mut license = License::new("Apache License 2.0");
        license.identifier = Some("Apache-2.0".into());
        info.license = Some(license);
        Table(OpenApiRouter::with_openapi(OpenApiBuilder::new().info(info).build()))
    }

    /// The same, served over mutual TLS as well, at this port unless another one is named.
    pub fn on_a_port_as_well(mut self, port: u16) -> Self {
        /// What it is called in the description.
        const MUTUAL_TLS: &str = "mutualTLS";
        let socket = ServerBuilder::new().url("http://localhost").description(Some("The Unix socket"));
        let variable = |value: String, what: &str| {
            ServerVariableBuilder::new().default_value(value).description(Some(what))
        };
        let by_tls = ServerBuilder::new()
            .url("https://{host}:{port}")
            .description(Some("A port, if the host's configuration has one by `[api]`"))
            .parameter("host", variable("localhost".into(), "The host's name, as its certificate has it"))
            .parameter("port", variable(port.to_string(), "The port"));
        let scheme = SecurityScheme::MutualTls {
            description: Some("A certificate of an authority that the host trusts".into()),
            deprecated: None,
            extensions: None,
        };
        let document = self.0.get_openapi_mut();
        document.servers = Some(vec![socket.build(), by_tls.build()]);
        document.components.get_or_insert_default().add_security_scheme(MUTUAL_TLS, scheme);
        let none: [&str; 0] = [];
        // On the socket it is the user who counts.
        document.security =
            Some(vec![SecurityRequirement::default(), SecurityRequirement::new(MUTUAL_TLS, none)]);
        self
    }

    /// The same with more.
    pub fn with(self, routes: UtoipaMethodRouter<S>) -> Self {
        Table(self.0.routes(routes))
    }

    /// What serves them, with what all APIs do alike.
    pub fn router(self, state: S) -> Router {
        let (router, _) = self.0.split_for_parts();
        router
            .fallback(async || Refusal::new(StatusCode::NOT_FOUND, "no such path; see docs/api.md"))
            .method_not_allowed_fallback(async || {
                Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "no such method on this path; see docs/api.md")
            })
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .with_state(state)
    }

    /// Their description as JSON.
    pub fn document(self) -> String {
        let mut document = self.0.into_openapi();
        describe_refusals(&mut document);
        // It has no keys but texts.
        document.to_pretty_json().unwrap_or_default()
    }
}

/// The answer that a description is.
pub(crate) fn told(document: &'static str) -> Response {
    ([(CONTENT_TYPE, "application/json")], document).into_response()
}

/// What every operation can answer, or every one that takes something.
fn describe_refusals(document: &mut OpenApi) {
    let mut error = vec![(ErrorBody::name().into_owned(), ErrorBody::schema())];
    ErrorBody::schemas(&mut error);
    document.components.get_or_insert_default().schemas.extend(error);
    let by_certificate = document.security.is_some();
    let operations = document.paths.paths.values_mut().flat_map(operations);
    for operation in operations {
        let (body, asked) = (operation.request_body.is_some(), operation.parameters.is_some());
        let wrong = (body || asked).then_some(("400", "What is asked is wrong"));
        let wrong_body = [
            ("413", "The body is too large"),
            ("415", "The body is not JSON by its Content-Type"),
            ("422", "The body is JSON that says what cannot be said"),
        ];
        let wrong_body = wrong_body.into_iter().filter(|_| body);
        let failed = [("500", "It has failed for a reason that is not the request's")];
        let kept_out = ("403", "Whoever has this certificate may not ask for it");
        let kept_out = by_certificate.then_some(kept_out);
        for (status, what) in wrong.into_iter().chain(kept_out).chain(wrong_body).chain(failed) {
            let schema = Ref::from_schema_name(ErrorBody::name());
            let content = ContentBuilder::new().schema(Some(schema)).build();
            let refused = ResponseBuilder::new().description(what).content("application/json", content);
            operation.responses.responses.entry(status.into()).or_insert_with(|| refused.build().into());
        }
    }
}

fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, options, head, patch, trace, .. } = path;
    [get, put, post, delete, options, head, patch, trace].into_iter().flatten()
}
