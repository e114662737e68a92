//! What an API says of itself by OpenAPI, and whether its answers are so.

use crate::http::call;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// A description, as its server gives it.
pub struct Described(pub Value);

impl Described {
    /// That of the server at this socket.
    ///
    /// # Panics
    /// When it has none.
    pub fn by(socket: &Path) -> Self {
        let (status, document) = call(socket, "GET", "/v1/openapi.json", "");
        assert_eq!(status, 200);
        Described(document)
    }

    /// The paths, each with its methods.
    ///
    /// # Panics
    /// When it is no description by OpenAPI.
    pub fn paths(&self) -> impl Iterator<Item = (&String, BTreeSet<String>)> {
        let methods = |path: &Value| path.as_object().unwrap().keys().map(|key| key.to_uppercase()).collect();
        self.0["paths"].as_object().unwrap().iter().map(move |(path, item)| (path, methods(item)))
    }

    /// This value is as the schema of this name says, and has nothing that is not described.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_is(&self, name: &str, value: &Value) {
        self.assert_fits(&json!({ "$ref": format!("#/components/schemas/{name}") }), value, name);
    }

    /// This answer has all that it must have, and nothing that is not described.
    ///
    /// # Panics
    /// When it is not so.
    pub fn assert_describes(&self, method: &str, path: &str, status: u16, body: &Value) {
        let method = method.to_lowercase();
        let response = &self.0["paths"][path][method.as_str()]["responses"][status.to_string()];
        let schema = &response["content"]["application/json"]["schema"];
        assert!(schema.is_object(), "{method} {path}, {status}: {response}");
        self.assert_fits(schema, body, &format!("{method} {path}, {status}"));
    }

    fn assert_fits(&self, schema: &Value, value: &Value, what: &str) {
        let mut schema = json!({ "allOf": [schema], "components": self.0["components"] });
        close(&mut schema["components"]);
        let validator = jsonschema::validator_for(&schema).unwrap();
        let wrong: Vec<_> =
            validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(wrong.is_empty(), "{what}: {wrong:#?} in {value:#}");
    }
}

/// Lets every object of these schemas have no other properties than those that are described.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(parts) => {
            parts.values_mut().for_each(close);
            if parts.get("properties").is_some_and(Value::is_object) {
                parts.insert("additionalProperties".into(), false.into());
            }
        }
        Value::Array(parts) => parts.iter_mut().for_each(close),
        _ => {}
    }
}
