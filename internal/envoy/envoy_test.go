package envoy

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The other direction of the mapping loses nothing that matters to an alert: a failure of the server stays one.
func TestGRPCCodesAndStatusesOfHTTPAgree(t *testing.T) {
	for i := range GRPCCodes {
		code := GRPCCode(i)
		if code.Number() != strconv.Itoa(i) || code.String() == "" || code.EnvoyName() == "" || code.HTTPStatus() == 0 {
			t.Errorf("the row of code %d is %q, %q, %q, %d", i, code.Number(), code, code.EnvoyName(), code.HTTPStatus())
		}
		if got, ok := ParseGRPCCode([]byte(code.Number())); !ok || got != code {
			t.Errorf("%q is read as %v, %v", code.Number(), got, ok)
		}
	}
	for _, text := range []string{"", "17", "00", "-1", "OK", "1 "} {
		if code, ok := ParseGRPCCode([]byte(text)); ok {
			t.Errorf("%q is read as %v", text, code)
		}
	}
	for status, want := range map[int]string{
		400: "13", 401: "16", 403: "7", 404: "12", 408: "2", 418: "2", 429: "14", 431: "13", 500: "2", 502: "14", 503: "14", 504: "14",
	} {
		if got := GRPCCodeOf(status).Number(); got != want {
			t.Errorf("status %d of HTTP is code %s, want %s", status, got, want)
		}
	}
	var failures []string
	for i := range GRPCCodes {
		if GRPCCode(i).HTTPStatus() >= http.StatusInternalServerError {
			failures = append(failures, GRPCCode(i).Number())
		}
	}
	if want := []string{"2", "4", "12", "13", "14", "15"}; !slices.Equal(failures, want) {
		t.Errorf("codes %v are failures of the server, want %v", failures, want)
	}
}

func TestDetailsOfResetsHaveNoSpaces(t *testing.T) {
	before, after := ResetBeforeResponse(ResetByTermination), ResetAfterResponse(ResetByTermination)
	if before != "upstream_reset_before_response_started{connection_termination}" || !IsResetBeforeResponse(before) {
		t.Errorf("before the response: %q", before)
	}
	if after != "upstream_reset_after_response_started{connection_termination}" || IsResetBeforeResponse(after) {
		t.Errorf("after the head of the response: %q", after)
	}
}

func TestNamesOfInboundClustersAreKeptUpToABound(t *testing.T) {
	for port := range 1 << 16 {
		if got, want := InboundCluster(uint16(port)), "inbound|"+strconv.Itoa(port)+"||"; got != want {
			t.Fatalf("port %d has the cluster %q", port, got)
		}
	}
	if n := len(inboundNames.byPort); n != maxNames {
		t.Errorf("%d names are kept after a scan of all ports, want %d", n, maxNames)
	}
	if n := testing.AllocsPerRun(100, func() { InboundCluster(7) }); n != 0 {
		t.Errorf("the name of a known port costs %v allocations", n)
	}
}

// everyday are words that are not looked for, because they mean many things.
var everyday = []string{"default", "OK", "overload", "UNKNOWN", "Unknown"}

// TestNoWordIsSpelledOutElsewhere fails when the non-test code of another room has a flag, a detail, a name or a gRPC
// code as a literal of its own.
func TestNoWordIsSpelledOutElsewhere(t *testing.T) {
	words := make(map[string]bool)
	eachLiteral(t, ".", func(_ string, _ token.Position, text string) {
		if !slices.Contains(everyday, text) && len(text) > 1 && text[0] > '9' {
			words[text] = true
		}
	})
	if len(words) < 60 {
		t.Fatalf("only %d words were found in this package", len(words))
	}
	for _, word := range []string{"upstream_reset_before_response_started", "upstream_reset_after_response_started", "inbound|"} {
		words[word] = true
	}
	eachLiteral(t, "../..", func(path string, at token.Position, text string) {
		if strings.HasPrefix(path, "../../internal/envoy/") {
			return
		}
		for _, word := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == '{' }) {
			if words[word] && exempt[[2]string{path, word}] == "" {
				t.Errorf("%s: %q is spelled out: use package envoy", at, word)
			}
		}
	})
}

// exempt are the literals that are spelled like a word of this package and mean something else.
var exempt = map[[2]string]string{
	{"../../internal/admin/dump.go", "stream_idle_timeout"}: "a field of the message HttpConnectionManager",
	{"../../internal/mesh/hcm.go", "stream_idle_timeout"}:   "a field of the message HttpConnectionManager",
	{"../../internal/mesh/routes.go", "direct_response"}:    "a field of the message Route",
}

// eachLiteral calls f for each string literal of the non-test Go files below dir, import paths aside.
func eachLiteral(t *testing.T, dir string, f func(path string, at token.Position, text string)) {
	t.Helper()
	files := token.NewFileSet()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == "testdata" || len(entry.Name()) > 2 && entry.Name()[0] == '.'):
			return fs.SkipDir
		case entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ImportSpec:
				return false
			case *ast.BasicLit:
				if n.Kind == token.STRING {
					if text, err := strconv.Unquote(n.Value); err == nil {
						f(filepath.ToSlash(path), files.Position(n.Pos()), text)
					}
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
