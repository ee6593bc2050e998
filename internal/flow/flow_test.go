package flow

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

type lastRecord struct{ closed []*Record }

func (l *lastRecord) Closed(r *Record) { l.closed = append(l.closed, r) }

func TestARecordIsClosedExactlyOnce(t *testing.T) {
	var sink lastRecord
	r := Open(Outbound, netip.MustParseAddrPort("198.51.100.2:4711"))
	failure := errors.New("no route")
	r.Close(&sink, UpstreamUnreachable, failure)
	if len(sink.closed) != 1 || sink.closed[0] != r || r.Reason != UpstreamUnreachable || r.Err != failure || r.Duration < 0 {
		t.Fatalf("closed %v, record %+v", sink.closed, r)
	}
	defer func() {
		if recover() == nil {
			t.Error("a second Close did not panic")
		}
		if len(sink.closed) != 1 {
			t.Error("a second Close reached the sink")
		}
	}()
	r.Close(&sink, Closed, nil)
}

// The constants are read from the source, so that the test covers new ones.
func TestEveryReasonIsExplained(t *testing.T) {
	declared := declaredReasons(t)
	explained := map[Reason]bool{}
	for _, e := range Explanations {
		if explained[e.Reason] {
			t.Errorf("%s is explained twice", e.Reason)
		}
		if len(e.Text) < 10 || e.Text[len(e.Text)-1] != '.' {
			t.Errorf("%s: %q is not a sentence", e.Reason, e.Text)
		}
		for _, flag := range strings.Split(e.Flags+","+e.RequestFlags, ",") {
			if flag != "" && !slices.Contains(envoyFlags, flag) {
				t.Errorf("%s: Envoy has no flag %q", e.Reason, flag)
			}
		}
		explained[e.Reason] = true
	}
	for _, reason := range declared {
		if !explained[reason] {
			t.Errorf("%s is not explained", reason)
		}
	}
	if len(declared) != len(explained) {
		t.Errorf("%d reasons are declared and %d explained", len(declared), len(explained))
	}
}

// envoyFlags are the response flags of Envoy.
var envoyFlags = strings.Fields("LH UH UT LR UR UF UC UO NR DI FI RL UAEX RLSE DC URX SI IH DPE UMSDR RFCF NFCF DT UPE NC OM DF DO DR UDO")

func declaredReasons(t *testing.T) []Reason {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "reason.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var reasons []Reason
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if name, ok := spec.Type.(*ast.Ident); ok && name.Name == "Reason" {
			text, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			reasons = append(reasons, Reason(text))
		}
		return true
	})
	return reasons
}

func TestTextsNameSettingsInsteadOfFlags(t *testing.T) {
	e := Explanation{Text: "Nothing moved for `{IdleTimeout}` or {A}."}
	if got, want := e.Render(strings.ToLower), "Nothing moved for `idletimeout` or a."; got != want {
		t.Errorf("rendered as %q, want %q", got, want)
	}
	if got, want := e.Render(nil), "Nothing moved for `IdleTimeout` or A."; got != want {
		t.Errorf("rendered without names as %q, want %q", got, want)
	}
	for _, e := range Explanations {
		if strings.Contains(e.Text, "--") {
			t.Errorf("%s: %q names a flag", e.Reason, e.Text)
		}
	}
}
