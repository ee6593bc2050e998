package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// A spool is a buffer, whether it has a file or not.
func TestASpoolKeepsEveryByte(t *testing.T) {
	large := strings.Repeat("0123456789abcdef", spoolMemory/16/2) // half of what stays in memory
	for name, directory := range map[string]string{"with a file": t.TempDir(), "without a place for one": "/nonexistent"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("TMPDIR", directory)
			s := &spool{}
			defer s.close()
			want := ""
			write := func(text string) {
				t.Helper()
				if n, err := s.WriteString(text); n != len(text) || err != nil {
					t.Fatal(n, err)
				}
				want += text
			}
			cut := func(size int) {
				t.Helper()
				if err := s.Truncate(int64(size)); err != nil {
					t.Fatal(err)
				}
				want = want[:size]
			}
			write("a")
			cut(0)
			write("b\n")
			for range 5 {
				write(large)
			}
			write("c")
			cut(len(want) - 1)            // in memory
			cut(len(want) - len(large)*4) // in the file
			write("d")
			write(large)
			cut(len(want)) // nothing
			write(large)
			write(large)
			if s.Size() != int64(len(want)) || (s.file != nil) != (name == "with a file") {
				t.Errorf("%d bytes, want %d; file %v", s.Size(), len(want), s.file)
			}
			var got bytes.Buffer
			if err := s.writeTo(&got); err != nil || got.String() != want {
				t.Errorf("%v; %d bytes, want %d, the same: %v", err, got.Len(), len(want), got.String() == want)
			}
		})
	}
}

func TestASpoolSeparatesFiles(t *testing.T) {
	for _, c := range []struct {
		texts [][]string
		want  string
	}{
		{[][]string{{"a\n"}, {"b\n"}}, "a\n---\nb\n"},
		{[][]string{{"a"}, {"", "b", "c"}}, "a\n---\nbc"},
		{[][]string{{}, {"b"}}, "b"},
		{[][]string{{"a\n"}, {}, {"--- # c\n"}}, "a\n--- # c\n"},
	} {
		s := &spool{}
		for _, texts := range c.texts {
			s.begin()
			for _, text := range texts {
				if _, err := s.WriteString(text); err != nil {
					t.Fatal(err)
				}
			}
		}
		var got bytes.Buffer
		if err := s.writeTo(&got); err != nil || got.String() != c.want {
			t.Errorf("%q: %q, %v, want %q", c.texts, got.String(), err, c.want)
		}
	}
}

type broken struct{}

var errBroken = errors.New("broken")

func (broken) Write([]byte) (int, error) { return 0, errBroken }

func TestAFailedWriteIsReported(t *testing.T) {
	s := &spool{}
	defer s.close()
	for range 3 {
		if _, err := s.WriteString(strings.Repeat("x", spoolMemory)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.writeTo(broken{}); !errors.Is(err, errBroken) {
		t.Errorf("%v", err)
	}
}
