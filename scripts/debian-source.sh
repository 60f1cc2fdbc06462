# Source packages of the Debian archives that this machine is configured for; sourced by the scripts that need one.
# shellcheck shell=bash

# The Debian archives of this machine's own configuration, as apt itself understands it (either list format).
debian_archives() {
	apt-get indextargets --format '$(REPO_URI)|$(ORIGIN)|$(LABEL)' 'Created-By: Packages' 2>/dev/null |
		awk -F'|' '$2 == "Debian" && $3 == "Debian" { print $1 }' | sort -u
}

# fetch_source SUITE URI FOLDER SOURCE[=VERSION]: its source tarball in FOLDER, through private apt lists, so that nothing of the
# system changes; apt checks signatures.
fetch_source() {
	local suite=$1 uri=$2 folder=$3 source=$4 signed='' keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
	[ -r "$keyring" ] && signed="[signed-by=$keyring] "
	printf 'deb-src %s%s %s main\n' "$signed" "$uri" "$suite" >"$folder/sources.list"
	local options=(-q -o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
		-o "Dir::State::Lists=$folder/lists" -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
	(cd "$folder" && step apt-get "${options[@]}" --error-on=any update &&
		step apt-get "${options[@]}" source --tar-only --download-only "$source") || return 1
	ls "$folder/${source%%=*}"_*.orig.tar.* >/dev/null 2>&1
}
