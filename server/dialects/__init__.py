"""The dialects of the API: each file translates one API's bodies into choices, and the answers back."""
