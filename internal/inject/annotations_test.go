package inject

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// The author of a pod has set an annotation. An error about its value names that annotation, and no flag of init.
func TestAnErrorOfAnAnnotationNamesNoFlag(t *testing.T) {
	flag := regexp.MustCompile(`(^|[ (])--?[a-z]`)
	for _, a := range Annotations {
		if a.parse == nil {
			continue
		}
		refused := 0
		for _, text := range []string{"*,8080", "90:80", "0", "70000", "10.0.0.0/33", "a b", "eth0 -j", "NONE", "-1", "{", "10Gb", "%NONE%"} {
			s, err := Options{Image: "pillion"}.settings()
			if err == nil {
				err = parseAnnotations(s, map[string]any{a.Name: text})
			}
			if err == nil {
				err = s.finish(30 * time.Second)
			}
			if err == nil {
				continue
			}
			refused++
			message := strings.ReplaceAll(err.Error(), text, "VALUE")
			if !strings.HasPrefix(message, "annotation "+a.Name+": ") || flag.MatchString(message) {
				t.Errorf("%s: %q: %v", a.Name, text, err)
			}
		}
		if refused == 0 {
			t.Errorf("%s: no value was refused", a.Name)
		}
	}
}
