package main

import (
	"fmt"
	"strings"
	"testing"
)

func TestMarkersAreFoundAtTheirLine(t *testing.T) {
	for _, c := range []struct{ comment, want string }{
		{"// nil for none.", "1"},
		{"// Nothing is lost.", "1"},
		{"// A name that is no address.", "1"},
		{"// The record says\n// who is told.", "1 2"},
		{"// It is closed,\n// which frees the port.", "1"},
		{"// What comes first is read.\n// Whoever waits sees it.", "1 2"},
		{"// Every byte, but for the last, so long, for ever, anew.", "1"},
		{"// A comment\n// wrapped in a so\n// many lines.", "2"},

		{"// There is no limit, and it is no longer than that.", ""},
		{"// RFC 9110 §5.5 says that a field ends.", ""},
		{"// The mode `none`, and \"none\", are values.", ""},
		{"// What is it? Nothing.", ""},
		{"// So many bytes that the buffer is full.", ""},
		{"// Not for one but for both.", ""},
		{"//go:build none", ""},
		{"/* none\n   of them\n   knows */", "1 3"},
	} {
		r := newReport()
		if err := r.add("x/y.go", []byte(c.comment+"\n\npackage y\n")); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range r.findings {
			got = append(got, fmt.Sprint(f.line))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s\nfound in lines %v, want %q", c.comment, r.findings, c.want)
		}
		if r.comments.marked != len(got) {
			t.Errorf("%s\n%d lines counted, %d found", c.comment, r.comments.marked, len(got))
		}
	}
}

func TestStringsAndCodeAreNotComments(t *testing.T) {
	r := newReport()
	if err := r.add("y.go", []byte("package y\n\nconst none = \"nobody said // so\"\n\n// A constant.\n")); err != nil {
		t.Fatal(err)
	}
	if r.comments.marked != 0 || r.comments.lines != 1 {
		t.Errorf("%v %v", r.comments, r.findings)
	}
}

func TestDocumentsAreJudgedWithoutTheirCode(t *testing.T) {
	r := newReport()
	document := "# Who listens\n\nThe agent tells\nnobody.\n\n```\nnobody knows\n```\n\n| a | `none` |\n|---|---|\n| What comes | is read |\n"
	if err := r.add("a.md", []byte(document)); err != nil {
		t.Fatal(err)
	}
	if r.documents.lines != 6 || r.documents.marked != 3 {
		t.Errorf("%v %v", r.documents, r.findings)
	}
}

func TestAFileThatIsNotGoIsAnError(t *testing.T) {
	if err := newReport().add("y.go", []byte("none")); err == nil {
		t.Error("no error")
	}
}
