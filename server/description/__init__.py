"""The API's own description: an OpenAPI document made of the endpoints' types, and a page that shows it."""
