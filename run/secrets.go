package run

import (
	"net/url"
	"strings"
)

// masked replaces the value of a credential.
const masked = "(masked)"

// secretWords are parts of names whose values are credentials, in lower case.
var secretWords = []string{"auth", "token", "secret", "password", "passwd", "cookie", "api-key", "apikey", "api_key", "credential", "signature", "session"}

// plainFields contain one of secretWords and are not credentials.
var plainFields = map[string]bool{":authority": true, "www-authenticate": true, "proxy-authenticate": true}

// secretField reports whether a header field has a credential.
func secretField(name string) bool {
	name = strings.ToLower(name)
	return !plainFields[name] && containsSecret(name)
}

func containsSecret(name string) bool {
	for _, word := range secretWords {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}

// maskQuery masks the values of parameters with credentials in the query of a URL.
func maskQuery(query string) string {
	pairs := strings.Split(query, "&")
	for i, pair := range pairs {
		name, _, found := strings.Cut(pair, "=")
		plain := strings.ToLower(unescape(name))
		if found && (containsSecret(plain) || plain == "key" || plain == "sig" || plain == "code") {
			pairs[i] = name + "=" + url.QueryEscape(masked)
		}
	}
	return strings.Join(pairs, "&")
}
