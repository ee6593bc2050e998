package live

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"net/http"
	"strings"
	"sync"
)

// page is one self-contained file. Values from traffic enter it as text only, never as markup.
//
//go:embed page.html
var page string

// policy permits the page's own script and style, by their hashes, and requests to the server of the page. It disables any
// markup that a bug lets into the page.
var policy = sync.OnceValue(func() string {
	return "default-src 'none'; script-src '" + hashOf("script") + "'; style-src '" + hashOf("style") +
		"'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
})

// hashOf returns the hash of the content of the page's only element of that name.
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
	w.Header().Set("Content-Security-Policy", policy())
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Write([]byte(page))
}
