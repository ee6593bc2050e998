package live

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net/http"
	"strings"
)

// page is one file that needs nothing else. What traffic carries gets into it as text only, never as markup.
//
//go:embed page.html
var page string

// policy lets the page run its own script and style, known by their hashes, and talk to the server that it came from.
// Markup that got into it by mistake would do nothing.
var policy = "default-src 'none'; script-src '" + hashOf("script") + "'; style-src '" + hashOf("style") +
	"'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// hashOf is the hash of the content of the page's only element of that name.
func hashOf(element string) string {
	_, rest, _ := strings.Cut(page, "<"+element+">")
	content, _, found := strings.Cut(rest, "</"+element+">")
	if !found {
		panic("live: page.html has no <" + element + ">")
	}
	sum := sha256.Sum256([]byte(content))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

func servePage(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", policy)
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Write([]byte(page))
}
