package urlpath

import (
	"bytes"
	"errors"
	"net/url"
	"strings"
	"testing"
)

// TestAppend has a path in each form that the control plane configures: NONE, BASE, MERGE_SLASHES and
// DECODE_AND_MERGE_SLASHES of Istio's pathNormalization.
func TestAppend(t *testing.T) {
	none, base := Form{}, Form{Normalize: true}
	merged := Form{Normalize: true, MergeSlashes: true}
	decoded := Form{Normalize: true, MergeSlashes: true, Slashes: UnescapeSlashes}
	for _, c := range []struct {
		target                      string
		none, base, merged, decoded string // "" is: as it is
	}{
		{target: "/"},
		{target: "/a/b.c-d_e~f?x=%2e&/../"},
		{target: "*"},
		{target: "/a//b", merged: "/a/b", decoded: "/a/b"},
		{target: "//", merged: "/", decoded: "/"},
		{target: "/a/./b", base: "/a/b", merged: "/a/b", decoded: "/a/b"},
		{target: "/a/../b", base: "/b", merged: "/b", decoded: "/b"},
		{target: "/a/..", base: "/", merged: "/", decoded: "/"},
		{target: "/a/b/..", base: "/a/", merged: "/a/", decoded: "/a/"},
		{target: "/a/.", base: "/a/", merged: "/a/", decoded: "/a/"},
		{target: "/..", base: "/", merged: "/", decoded: "/"},
		{target: "/../../a", base: "/a", merged: "/a", decoded: "/a"},
		{target: "/a/...", base: "/a/...", merged: "/a/...", decoded: "/a/..."},
		{target: "/a/.../b/.c/..d"},
		{target: "/a//../b", base: "/a/b", merged: "/a/b", decoded: "/a/b"},
		{target: "/a/%2e%2E/b", base: "/b", merged: "/b", decoded: "/b"},
		{target: "/a/.%2e/b?q", base: "/b?q", merged: "/b?q", decoded: "/b?q"},
		{target: "/a/%2e", base: "/a/", merged: "/a/", decoded: "/a/"},
		{target: `/a\b`, base: "/a/b", merged: "/a/b", decoded: "/a/b"},
		{target: `/a/..\b`, base: "/b", merged: "/b", decoded: "/b"},
		{target: `/a\\b?c\d`, base: `/a//b?c\d`, merged: `/a/b?c\d`, decoded: `/a/b?c\d`},
		{target: "/%61%4A%30%7e%2D%5f", base: "/aJ0~-_", merged: "/aJ0~-_", decoded: "/aJ0~-_"},
		{target: "/%20%3b%3B%25%ff"},
		{target: "/a b\"<>^`{|}", base: "/a%20b%22%3C%3E%5E%60%7B%7C%7D", merged: "/a%20b%22%3C%3E%5E%60%7B%7C%7D", decoded: "/a%20b%22%3C%3E%5E%60%7B%7C%7D"},
		{target: "/a;b=c,d@e:f[g]!$&'()*+"},
		{target: "/%zz%2", base: "/%zz%2"},
		{target: "/ä", base: "/%C3%A4", merged: "/%C3%A4", decoded: "/%C3%A4"},
		{target: "/a%2Fb", decoded: "/a/b"},
		{target: "/a%5cb", decoded: "/a/b"},
		{target: "/a%2f..%2Fb", decoded: "/b"},
		{target: "/a%2f%2e%2e%5cb", base: "/a%2f..%5cb", merged: "/a%2f..%5cb", decoded: "/b"},
		{target: "/a%2f/%2Fb", decoded: "/a/b"},
		{target: "/a%252fb"},
		{target: "/a?b%2f..%2fc"},
	} {
		for _, f := range []struct {
			form Form
			want string
		}{{none, c.none}, {base, c.base}, {merged, c.merged}, {decoded, c.decoded}} {
			want := f.want
			if want == "" {
				want = c.target
			}
			got, err := f.form.Append([]byte("x"), []byte(c.target))
			if err != nil || string(got) != "x"+want {
				t.Errorf("%+v: %q becomes %q, %v; want %q", f.form, c.target, got, err, want)
			}
			if f.form.Has([]byte(c.target)) && want != c.target {
				t.Errorf("%+v: Has(%q), which becomes %q", f.form, c.target, want)
			}
		}
	}
	for _, target := range []string{"/", "/reviews/1", "/a-b_c~d/e.f?x=1&y=../..", "/index.html", "/@me/*"} {
		if !decoded.Has([]byte(target)) || !(Form{Strict: true}).Has([]byte(target)) {
			t.Errorf("Has(%q) is false: ordinary paths would be copied", target)
		}
	}
}

func TestAppendWithoutNormalization(t *testing.T) {
	for _, c := range []struct {
		form         Form
		target, want string
	}{
		{Form{Slashes: UnescapeSlashes}, `/a%2fb%5Cc\d/../%61`, `/a/b\c\d/../%61`},
		{Form{MergeSlashes: true}, `/a//b/%2f//?//`, `/a/b/%2f/?//`},
		{Form{MergeSlashes: true, Slashes: UnescapeSlashes}, `/a/%2f/b`, `/a/b`},
	} {
		if got, err := c.form.Append(nil, []byte(c.target)); err != nil || string(got) != c.want {
			t.Errorf("%+v: %q becomes %q, %v; want %q", c.form, c.target, got, err, c.want)
		}
	}
}

func TestAppendRejects(t *testing.T) {
	strict := Form{Normalize: true, Strict: true}
	for _, c := range []struct {
		form   Form
		target string
		want   error
		result string
	}{
		{Form{}, "/a#b", ErrFragment, ""},
		{Form{}, "/a?b#c", ErrFragment, ""},
		{Form{Normalize: true}, "/a%00", ErrNUL, ""},
		{Form{Normalize: true}, "/%2%45", ErrHiddenEscape, ""},
		{Form{Normalize: true}, "/%%32e", ErrHiddenEscape, ""},
		{Form{Normalize: true}, "/%2%7e%41%2f%41%%20", nil, "/%2~A%2fA%%20"},
		{Form{Normalize: true}, "/\xff", ErrNotUTF8, ""},
		{Form{Normalize: true}, "/a\xc3", ErrNotUTF8, ""},
		{Form{Slashes: RejectSlashes}, "/a%2fb", ErrEscapedSlash, ""},
		{Form{Slashes: RejectSlashes}, "/a%5Cb", ErrEscapedSlash, ""},
		{Form{Slashes: RejectSlashes}, "/a?%2f", nil, "/a?%2f"},
		{Form{Slashes: RedirectSlashes, Normalize: true}, "/a%2f../b?c", ErrRedirect, "/b?c"},
		{Form{Slashes: RedirectSlashes, Normalize: true}, "/a/../b", nil, "/b"},
		{Form{Strict: true}, "/a/../b", ErrAmbiguous, ""},
		{Form{Strict: true}, "/a/%2E", ErrAmbiguous, ""},
		{Form{Strict: true}, `/a\b`, ErrAmbiguous, ""},
		{Form{Strict: true, MergeSlashes: true}, "/a//b/.c/...", nil, "/a/b/.c/..."},
		{strict, "/a//b", ErrAmbiguous, ""},
		{strict, `/a/../b\c`, nil, "/b/c"},
		{strict, "/admin;x", ErrAmbiguous, ""},
		{strict, "/a%3bx", ErrAmbiguous, ""},
		{strict, "/a%252e", ErrAmbiguous, ""},
		{strict, "/a%2fb", ErrAmbiguous, ""},
		{strict, "/a%zz", ErrAmbiguous, ""},
		{strict, "/a%0ab", ErrAmbiguous, ""},
		{strict, "/a%20b?;%2f%zz", nil, "/a%20b?;%2f%zz"},
		{Form{Strict: true, Slashes: UnescapeSlashes}, "/a%2fb", nil, "/a/b"},
	} {
		got, err := c.form.Append([]byte("x"), []byte(c.target))
		if !errors.Is(err, c.want) || string(got) != "x"+c.result {
			t.Errorf("%+v: %q becomes %q, %v; want %q, %v", c.form, c.target, got, err, c.result, c.want)
		}
		if c.form.Has([]byte(c.target)) && c.want != nil {
			t.Errorf("%+v: Has(%q), which is rejected", c.form, c.target)
		}
	}
}

// FuzzAppend holds the properties that policies rely on.
func FuzzAppend(f *testing.F) {
	for _, seed := range []string{"/", "/a/%2e./b//c\\..\\d?e", "/%2f%5c%252f;x", "/..%2f..", "/a\xff#"} {
		for bits := range byte(40) {
			f.Add([]byte(seed), bits)
		}
	}
	f.Fuzz(func(t *testing.T, target []byte, bits byte) {
		form := Form{Normalize: bits&1 > 0, MergeSlashes: bits&2 > 0, Strict: bits&4 > 0, Slashes: Slashes(bits >> 3 % 4)}
		once, err := form.Append(nil, target)
		if has := form.Has(target); has && (err != nil || !bytes.Equal(once, target)) {
			t.Fatalf("%+v: Has(%q), which becomes %q, %v", form, target, once, err)
		}
		if err != nil && err != ErrRedirect || !bytes.HasPrefix(target, []byte("/")) {
			return
		}
		path, query := Split(once)
		if _, want := Split(target); !bytes.Equal(query, want) {
			t.Fatalf("%+v: the query of %q becomes %q", form, target, query)
		}
		if !bytes.HasPrefix(path, []byte("/")) {
			t.Fatalf("%+v: %q becomes %q", form, target, once)
		}
		if form.MergeSlashes && bytes.Contains(path, []byte("//")) {
			t.Fatalf("%+v: %q becomes %q", form, target, once)
		}
		if form.Slashes != KeepSlashes && form.Slashes != RejectSlashes && !form.Normalize {
			return // decoding once more may find more: %252f
		}
		if !form.Normalize {
			return
		}
		for segment := range strings.SplitSeq(string(path), "/") {
			if decoded, err := url.PathUnescape(segment); err == nil && (decoded == "." || decoded == "..") || strings.Contains(segment, `\`) {
				t.Fatalf("%+v: %q becomes %q, with a dot segment or a backslash", form, target, once)
			}
		}
		if twice, err := form.Append(nil, once); err == nil && !bytes.Equal(once, twice) {
			t.Fatalf("%+v: %q becomes %q, and that %q", form, target, once, twice)
		}
	})
}
