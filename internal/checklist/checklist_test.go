package checklist

import (
	"bytes"
	"encoding/json"
	"testing"
)

func sample() (l List) {
	l.Add("kernel", OK, "Linux 6.1")
	l.AddWithRemedy("ports", Failed, "15006 is in use\nby another\x1b[2J", "stop it")
	l.AddWithRemedy("memory limit", Warning, "16 MiB", "use 64 MiB or more")
	l.Add("rules", Skipped, "not readable")
	return l
}

func TestEachCheckIsOneLineWithItsRemedy(t *testing.T) {
	const signs = `✓ kernel        Linux 6.1
✗ ports         15006 is in use by another�[2J: stop it
! memory limit  16 MiB: use 64 MiB or more
– rules         not readable
1 ok, 1 failed, 1 warnings, 1 skipped
`
	if got := sample().Text(false); got != signs {
		t.Errorf("got\n%swant\n%s", got, signs)
	}
	const plain = `ok   kernel        Linux 6.1
FAIL ports         15006 is in use by another�[2J: stop it
warn memory limit  16 MiB: use 64 MiB or more
skip rules         not readable
1 ok, 1 failed, 1 warnings, 1 skipped
`
	var out bytes.Buffer
	if err := sample().Write(&out, false); err != nil || out.String() != plain {
		t.Errorf("%v: got\n%swant\n%s", err, &out, plain)
	}
}

func TestJSONHasTheListAndTheResult(t *testing.T) {
	var out bytes.Buffer
	var got struct {
		Failed bool
		Checks List
	}
	if err := sample().Write(&out, true); err != nil || json.Unmarshal(out.Bytes(), &got) != nil || !got.Failed || len(got.Checks) != 4 || got.Checks[1] != sample()[1] {
		t.Errorf("%v %s", err, &out)
	}
	if sample()[:1].Failed() || sample()[2:].Failed() || !sample().Failed() {
		t.Error("a list fails if, and only if, a check failed")
	}
}

func TestSignsNeedALocaleOfUTF8(t *testing.T) {
	for _, c := range []struct {
		all, ctype, lang string
		want             bool
	}{{"", "", "", false}, {"C", "", "en_US.UTF-8", false}, {"", "C.utf8", "C", true}, {"", "", "de_DE.UTF-8", true}, {"en_US.UTF-8", "C", "C", true}} {
		values := map[string]string{"LC_ALL": c.all, "LC_CTYPE": c.ctype, "LANG": c.lang}
		if got := utf8Locale(func(name string) string { return values[name] }); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
